//! The gateway's loop: waits, reads what is ready, lets the images decide, writes what they said.

use super::snapshot::{ClientSnapshot, ImageSnapshot, LinkSnapshot, ReaderSnapshot, Snapshot};
use super::{Command, EventQueue, GatewayEvent};
use crate::geometry::BLOCK_BYTES;
use crate::io::{
    Filled, Poller, Ready, Stream, TlsConfig, Waker, boottime_ns, peer_process, tune_accepted,
};
use crate::nbd::Query;
use crate::nbd::budget::Budget;
use crate::nbd::serve::{Client, Need};
use crate::nbd::{Answer, Counters, Limits, TlsMode};
use crate::replica::{
    Background, Event, ImageIo, Instance, Link, LinkEvent, LinkTarget, NodeIndex, OpenSpec,
    Outcome, Output, ReaderIo, ReaderSpec, Served, Token,
};
use crate::wire::messages::HelloReply;
use rustix::net::SocketFlags;
use slab::Slab;
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, mpsc};
use std::time::Duration;

/// Tokens of descriptors: what they are in the upper half, which one in the lower.
pub(super) const WAKER: u64 = 0;
const LISTENER: u64 = 1 << 32;
const LINK: u64 = 2 << 32;
const CLIENT: u64 = 3 << 32;

const TICK_NS: u64 = 100_000_000;
const IMAGE_TICK_NS: u64 = 1_000_000_000;
/// A gap between ticks that means that we stood still, not the others.
const PAUSE_NS: u64 = 2_000_000_000;
/// Times that a client is read before others have their turn.
const READS_IN_TURN: usize = 16;
/// The client of our own zeroing requests.
const NOBODY: u64 = u64::MAX;

struct OpenImage {
    served: Served,
    /// Index of the link to each of its nodes.
    links: Vec<Option<usize>>,
    zeroing: Option<Zeroing>,
    counters: Counters,
    touched: bool,
}

/// A long range is zeroed step by step.
struct Zeroing {
    at: u64,
    end: u64,
}

pub(super) struct EventLoop {
    poller: Poller,
    waker: Waker,
    commands: mpsc::Receiver<Command>,
    events: Arc<EventQueue>,
    listeners: Vec<(OwnedFd, TlsMode)>,
    /// Of connections that begin with TLS from now on.
    tls: Option<TlsConfig>,
    links: Slab<Link>,
    link_names: HashMap<String, usize>,
    clients: Slab<Client>,
    client_serial: u64,
    refused_clients: u64,
    budget: Budget,
    /// Clients that the budget holds back, in the order in which they go on.
    held: Vec<usize>,
    images: HashMap<u32, OpenImage>,
    background: Background,
    touched: Vec<u32>,
    limits: Limits,
    now_ns: u64,
    next_tick_ns: u64,
    next_image_tick_ns: u64,
    link_events: Vec<LinkEvent>,
}

impl EventLoop {
    pub(super) fn new(
        poller: Poller,
        waker: Waker,
        commands: mpsc::Receiver<Command>,
        events: Arc<EventQueue>,
    ) -> EventLoop {
        let now_ns = boottime_ns();
        EventLoop {
            poller,
            waker,
            commands,
            events,
            listeners: Vec::new(),
            tls: None,
            links: Slab::new(),
            link_names: HashMap::new(),
            clients: Slab::new(),
            client_serial: 0,
            refused_clients: 0,
            budget: Budget::default(),
            held: Vec::new(),
            images: HashMap::new(),
            background: Background::default(),
            touched: Vec::new(),
            limits: Limits::default(),
            now_ns,
            next_tick_ns: now_ns,
            next_image_tick_ns: now_ns + IMAGE_TICK_NS,
            link_events: Vec::new(),
        }
    }

    pub(super) fn run(mut self) {
        let mut ready = Vec::with_capacity(256);
        loop {
            ready.clear();
            let wait = Duration::from_nanos(self.next_tick_ns.saturating_sub(self.now_ns).max(1));
            if let Err(error) = self.poller.wait(wait, &mut ready) {
                panic!("epoll_wait failed: {error}");
            }
            self.now_ns = boottime_ns();
            for event in &ready {
                self.ready(*event);
            }
            if ready.iter().any(|event| event.token == WAKER) && !self.obey() {
                return;
            }
            if self.now_ns >= self.next_tick_ns {
                self.tick();
            }
            self.settle();
            self.go_on_in_background();
        }
    }

    fn ready(&mut self, event: Ready) {
        let index = (event.token & 0xffff_ffff) as usize;
        match event.token & !0xffff_ffff {
            LISTENER => self.accept(index),
            LINK => self.link_ready(index),
            CLIENT => self.client_ready(index, event),
            _ => self.waker.drain(),
        }
    }

    // Clients

    fn accept(&mut self, listener: usize) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        // A few at a time, so that a flood of connections does not starve those that are served.
        for _ in 0..16 {
            let Some((listener, tls)) = self.listeners.get(listener) else { return };
            let Ok(fd) = rustix::net::accept_with(listener, flags) else { return };
            if self.clients.len() >= self.budget.limits.clients {
                self.refused_clients += 1;
                continue;
            }
            tune_accepted(&fd);
            let peer = peer_process(&fd);
            let entry = self.clients.vacant_entry();
            let index = entry.key();
            self.client_serial += 1;
            let id = self.client_serial << 32 | index as u64;
            let deadline_ns = self.now_ns + self.budget.limits.handshake_ns;
            let stream = Stream::new(fd);
            let client = Client::new(stream, id, peer, &self.limits, *tls, deadline_ns);
            if self.poller.add(client.stream.fd(), CLIENT | index as u64, false).is_ok() {
                entry.insert(client);
                self.flush_client(index);
            }
        }
    }

    fn client_ready(&mut self, index: usize, event: Ready) {
        let Some(client) = self.clients.get(index) else { return };
        if event.gone && client.is_paused(&self.budget) {
            // It is not read now, so nothing else would tell that it has gone.
            return self.end_client(index);
        }
        if event.readable {
            self.read_client(index);
        }
        if event.writable {
            self.resume_client(index);
        }
    }

    fn read_client(&mut self, index: usize) {
        // Level-triggered: told again of what is left.
        for _ in 0..READS_IN_TURN {
            let Some(client) = self.clients.get_mut(index) else { return };
            if client.is_paused(&self.budget) {
                return self.flush_client(index);
            }
            match client.fill(self.now_ns) {
                Err(error) if client.stream.is_in_tls_handshake() => {
                    return self.refuse_tls(index, &error);
                }
                Ok(Filled::Closed) | Err(_) => return self.end_client(index),
                Ok(filled) => {
                    self.process_client(index);
                    if filled == Filled::Drained {
                        return;
                    }
                }
            }
        }
    }

    /// Whether nothing of a client is to be worked on now; one that is gone has nothing.
    fn is_paused(&self, index: usize) -> bool {
        self.clients.get(index).is_none_or(|client| client.is_paused(&self.budget))
    }

    /// Works on what a client has sent, in whichever phase it is.
    fn process_client(&mut self, index: usize) {
        if self.is_paused(index) {
            self.flush_client(index);
            if self.is_paused(index) {
                return;
            }
        }
        let Some(client) = self.clients.get_mut(index) else { return };
        let need = match client.channel() {
            None => client.handshake(self.now_ns),
            Some(_) => Ok(Need::Nothing),
        };
        match need {
            Err(_) | Ok(Need::End) => return self.end_client(index),
            Ok(Need::Ask(query)) => self.ask(index, query),
            Ok(Need::StartTls) => return self.start_tls(index),
            Ok(Need::Nothing) => {}
        }
        self.serve_client(index);
        self.flush_client(index);
    }

    fn serve_client(&mut self, index: usize) {
        let Some(client) = self.clients.get_mut(index) else { return };
        let Some(channel) = client.channel() else { return };
        let Some(image) = self.images.get_mut(&channel) else { return self.end_client(index) };
        image.served.set_now(self.now_ns);
        let served = client.serve(&mut image.served, &self.budget);
        client.account(&mut self.budget);
        self.touch(channel);
        if served.is_err() {
            self.end_client(index);
        }
    }

    fn flush_client(&mut self, index: usize) {
        let Some(client) = self.clients.get_mut(index) else { return };
        let written = client.flush(self.now_ns);
        client.account(&mut self.budget);
        let paused = client.is_paused(&self.budget);
        if paused && !client.held && client.is_over(&self.budget) {
            client.held = true;
            self.held.push(index);
        }
        let changed = match (written, client.stream.interest_change(paused)) {
            (Ok(()), Some((read, write))) => {
                self.poller.change(client.stream.fd(), CLIENT | index as u64, read, write)
            }
            (written, _) => written,
        };
        if changed.is_err() || client.has_left() {
            self.end_client(index);
        }
    }

    /// Sends what waits; then what the client has sent meanwhile, and was held back, goes on.
    fn resume_client(&mut self, index: usize) {
        self.flush_client(index);
        let waits = |client: &Client| !client.stream.input.is_empty();
        if self.clients.get(index).is_some_and(waits) && !self.is_paused(index) {
            self.process_client(index);
        }
    }

    /// Those that the budget held back go on, where it got room.
    fn resume_held(&mut self) {
        if self.held.is_empty() || !self.budget.take_freed() {
            return;
        }
        for index in std::mem::take(&mut self.held) {
            // Another client may have the place by now: it loses nothing.
            if let Some(client) = self.clients.get_mut(index) {
                client.held = false;
                self.resume_client(index);
            }
        }
    }

    fn end_client(&mut self, index: usize) {
        let Some(mut client) = self.clients.try_remove(index) else { return };
        client.release(&mut self.budget);
        client.stream.end();
        // Closing the descriptor unregisters it as well.
        let _ = self.poller.remove(client.stream.fd());
        let (client, channel) = (client.id, client.last_channel());
        self.events.push(GatewayEvent::ClientGone { client, channel });
    }

    fn client_index(&self, id: u64) -> Option<usize> {
        let index = (id & 0xffff_ffff) as usize;
        self.clients.get(index).filter(|client| client.id == id).map(|_| index)
    }

    fn answer_query(&mut self, id: u64, answer: Answer, channel: Option<u32>) {
        let Some(index) = self.client_index(id) else { return };
        let answered = self.clients[index].answer(answer, channel, self.now_ns);
        match answered {
            Err(_) | Ok(Need::End) => self.end_client(index),
            Ok(Need::Ask(query)) => self.ask(index, query),
            Ok(Need::StartTls) => self.start_tls(index),
            Ok(Need::Nothing) => self.process_client(index),
        }
    }

    /// Hands a client's query to policy, with what is known of who asks.
    fn ask(&mut self, index: usize, query: Query) {
        let Some(client) = self.clients.get(index) else { return };
        let (id, peer, trusted) = (client.id, client.peer.clone(), client.trusted);
        let certificate = client.stream.peer_certificate();
        self.events.push(GatewayEvent::Asked { client: id, peer, trusted, certificate, query });
    }

    fn start_tls(&mut self, index: usize) {
        let Some(client) = self.clients.get_mut(index) else { return };
        let begun = self.tls.as_ref().map(|config| client.stream.start_tls(config));
        match begun {
            Some(Ok(())) => self.flush_client(index),
            _ => self.end_client(index),
        }
    }

    /// A client that could not show who it is; policy hears why.
    fn refuse_tls(&mut self, index: usize, error: &io::Error) {
        let why = error.to_string();
        self.events.push(GatewayEvent::TlsRefused { why });
        self.end_client(index);
    }

    // Links

    fn link_ready(&mut self, index: usize) {
        while let Some(link) = self.links.get_mut(index) {
            let more = link.ready(&self.poller, self.now_ns, &mut self.link_events);
            self.take_link_events(index);
            if !more {
                return;
            }
            self.settle();
        }
    }

    fn take_link_events(&mut self, index: usize) {
        let mut events = std::mem::take(&mut self.link_events);
        for event in events.drain(..) {
            match event {
                LinkEvent::Frame(frame) => self.take_frame(index, frame),
                LinkEvent::Up(hello) => {
                    let (instance, boot) = (instance_of(&hello), hello.boot);
                    self.for_images_of(index, |served, node| served.link_up(node, instance, boot));
                    self.events.push(GatewayEvent::LinkUp { hello });
                }
                LinkEvent::Down(why) => {
                    self.for_images_of(index, |served, node| served.link_down(node));
                    let node = self.links[index].target().node.clone();
                    self.events.push(GatewayEvent::LinkDown { node, why });
                }
            }
        }
        if self.link_events.is_empty() {
            self.link_events = events;
        } else {
            self.take_link_events(index);
        }
    }

    fn for_images_of(&mut self, link: usize, mut act: impl FnMut(&mut Served, NodeIndex)) {
        let mut touched = Vec::new();
        for (channel, image) in &mut self.images {
            let node = image.links.iter().position(|other| *other == Some(link));
            if let Some(node) = node {
                image.served.set_now(self.now_ns);
                act(&mut image.served, node as NodeIndex);
                touched.push(*channel);
            }
        }
        touched.into_iter().for_each(|channel| self.touch(channel));
    }

    fn take_frame(&mut self, link: usize, frame: crate::wire::Frame) {
        let channel = frame.channel;
        let Some(image) = self.images.get_mut(&channel) else { return };
        let Some(node) = image.links.iter().position(|other| *other == Some(link)) else { return };
        image.served.set_now(self.now_ns);
        if let Err(bad) = image.served.receive(node as NodeIndex, frame) {
            let why = format!("protocol error: {}", bad.0);
            self.links[link].end(&self.poller, self.now_ns, why, &mut self.link_events);
        }
        self.touch(channel);
    }

    fn add_link(&mut self, target: LinkTarget) {
        if let Some(index) = self.link_names.get(&target.node).copied() {
            if *self.links[index].target() == target {
                return;
            }
            self.remove_link(&target.node);
        }
        let entry = self.links.vacant_entry();
        let index = entry.key();
        let node = target.node.clone();
        entry.insert(Link::new(target, LINK | index as u64));
        for image in self.images.values_mut() {
            if let Some(at) = image.served.nodes().iter().position(|name| *name == node) {
                image.links[at] = Some(index);
            }
        }
        self.link_names.insert(node, index);
        self.next_tick_ns = self.now_ns;
    }

    fn remove_link(&mut self, node: &str) {
        let Some(index) = self.link_names.remove(node) else { return };
        let why = "no longer wanted".to_string();
        self.links[index].end(&self.poller, self.now_ns, why, &mut self.link_events);
        self.take_link_events(index);
        self.links.remove(index);
        for image in self.images.values_mut() {
            image.links.iter_mut().filter(|link| **link == Some(index)).for_each(|l| *l = None);
        }
    }

    // Images

    fn open(&mut self, spec: OpenSpec) {
        let channel = spec.channel;
        let io = ImageIo::new(spec, &self.background);
        self.serve(channel, Served::Image(Box::new(io)));
    }

    fn open_reader(&mut self, spec: ReaderSpec) {
        let channel = spec.channel;
        let io = ReaderIo::new(spec, self.now_ns);
        self.serve(channel, Served::Reader(Box::new(io)));
    }

    fn serve(&mut self, channel: u32, mut served: Served) {
        assert!(!self.images.contains_key(&channel), "channel {channel} is taken");
        let nodes = served.nodes().iter();
        let links: Vec<_> = nodes.map(|node| self.link_names.get(node).copied()).collect();
        for (node, link) in links.iter().enumerate() {
            let ready = link.map(|link| &self.links[link]).filter(|link| link.is_ready());
            if let Some(link) = ready {
                served.link_up(node as NodeIndex, instance_of(&link.hello), link.hello.boot);
            }
        }
        let counters = Counters::default();
        let image = OpenImage { served, links, zeroing: None, counters, touched: false };
        self.images.insert(channel, image);
        self.touch(channel);
    }

    /// Has an image that is held do something.
    fn with_image(&mut self, channel: u32, act: impl FnOnce(&mut ImageIo)) {
        self.with_served(channel, |served| {
            if let Some(io) = served.image_mut() {
                act(io);
            }
        });
    }

    fn with_served(&mut self, channel: u32, act: impl FnOnce(&mut Served)) {
        if let Some(image) = self.images.get_mut(&channel) {
            image.served.set_now(self.now_ns);
            act(&mut image.served);
            self.touch(channel);
        }
    }

    /// Work in the background that waits for its turn goes on where there is room.
    fn go_on_in_background(&mut self) {
        for _ in 0..self.background.waiting() {
            let Some(channel) = self.background.offer(self.now_ns) else { return };
            self.with_served(channel, Served::pace);
            self.settle();
            self.background.offer_over();
        }
    }

    fn touch(&mut self, channel: u32) {
        if let Some(image) = self.images.get_mut(&channel).filter(|image| !image.touched) {
            image.touched = true;
            self.touched.push(channel);
        }
    }

    /// Carries out what images want until they want nothing, then writes everything.
    fn settle(&mut self) {
        let (mut links, mut clients) = (0u128, Vec::new());
        while let Some(channel) = self.touched.pop() {
            let Some(image) = self.images.get_mut(&channel) else { continue };
            image.touched = false;
            while let Some(output) = image.served.take_output() {
                match output {
                    Output::Send { node, head, payload } => {
                        if let Some(link) = image.links[usize::from(node)] {
                            self.links[link].push(head, payload);
                            links |= 1 << (link % 128);
                        }
                    }
                    Output::Answer { token, outcome } if token.client == NOBODY => {
                        let done = outcome == Outcome::Done;
                        step_zeroing(image, channel, done, &self.events);
                    }
                    Output::Answer { token, outcome } => {
                        let index = (token.client & 0xffff_ffff) as usize;
                        let client = self.clients.get_mut(index);
                        if let Some(client) = client.filter(|client| client.id == token.client) {
                            let (counters, served) = (&mut image.counters, &mut image.served);
                            client.reply(token.cookie, outcome, counters, served);
                            if clients.last() != Some(&index) {
                                clients.push(index);
                            }
                        }
                    }
                    Output::Event(event) => {
                        let hello = hello_for(&event, &image.links, &self.links);
                        self.events.push(GatewayEvent::Image { channel, event, hello });
                    }
                }
            }
            image.served.report_background();
        }
        self.flush_links(links);
        for index in clients {
            self.resume_client(index);
        }
        self.resume_held();
        if !self.touched.is_empty() {
            self.settle();
        }
    }

    fn flush_links(&mut self, mask: u128) {
        for index in 0..self.links.capacity() {
            if mask & (1 << (index % 128)) == 0 {
                continue;
            }
            let Some(link) = self.links.get_mut(index) else { continue };
            link.flush(&self.poller, self.now_ns, &mut self.link_events);
            if !self.link_events.is_empty() {
                self.take_link_events(index);
            }
        }
    }

    // Orders and time

    /// Carries out what Python ordered. False: stop.
    fn obey(&mut self) -> bool {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Listen(fd, tls) => self.listen(fd, tls),
                Command::Tls(config) => self.tls = Some(config),
                Command::Limit(limits) => self.budget.limits = limits,
                Command::Link(target) => self.add_link(target),
                Command::Unlink(node) => self.remove_link(&node),
                Command::Open(spec) => self.open(spec),
                Command::OpenReader(spec) => self.open_reader(spec),
                Command::Peek { channel, node } => self.with_image(channel, |io| io.peek(node)),
                Command::Admit { channel, nodes, resume } => {
                    self.with_image(channel, |io| io.admit(&nodes, resume));
                }
                Command::Reconfigure { channel, generation, digest, body, in_sync, layering } => {
                    self.with_image(channel, |io| {
                        io.reconfigure(generation, digest, body, &in_sync, layering);
                    });
                }
                Command::AskEmptied { channel } => {
                    self.with_image(channel, ImageIo::ask_emptied);
                }
                Command::Freeze { channel, attempt } => {
                    self.with_image(channel, |io| io.freeze(attempt));
                }
                Command::Thaw { channel, attempt } => {
                    self.with_image(channel, |io| io.thaw(attempt));
                }
                Command::RefuseWrites { channel, sets } => {
                    self.with_image(channel, |io| io.refuse_writes(&sets));
                }
                Command::Heal { channel, spec } => self.with_image(channel, |io| io.heal(spec)),
                Command::EndHeal { channel, attempt } => {
                    self.with_image(channel, |io| io.end_heal(attempt));
                }
                Command::WritesLost { channel, sets } => {
                    self.with_image(channel, |io| io.former_writes_lost(&sets));
                }
                Command::Scrub { channel, spec } => self.with_image(channel, |io| io.scrub(spec)),
                Command::EndScrub { channel, attempt } => {
                    self.with_image(channel, |io| io.end_scrub(attempt));
                }
                Command::LeaseDeadline { channel, deadline_ns } => {
                    self.with_image(channel, |io| io.set_lease_deadline(deadline_ns));
                }
                Command::Close { channel } => self.with_served(channel, Served::close),
                Command::Kill { channel } => self.with_served(channel, Served::kill),
                Command::Forget { channel } => self.forget(channel),
                Command::StopListening => self.listeners.clear(),
                Command::Disconnect { channel } => self.disconnect(channel),
                Command::Resize { channel, size_bytes, body } => {
                    self.with_image(channel, |io| io.resize(size_bytes, body));
                    for index in self.clients_of(channel) {
                        self.clients[index].grown(size_bytes);
                    }
                }
                Command::Reconnect { channel } => self.dismiss(channel),
                Command::Zero { channel, offset, length } => self.zero(channel, offset, length),
                Command::Answer { client, answer, channel } => {
                    self.answer_query(client, answer, channel);
                }
                Command::Snapshot(sender) => drop(sender.send(self.snapshot())),
                Command::Stop => return false,
            }
        }
        true
    }

    fn listen(&mut self, fd: OwnedFd, tls: TlsMode) {
        let token = LISTENER | self.listeners.len() as u64;
        let ready = rustix::io::ioctl_fionbio(&fd, true)
            .map_err(io::Error::from)
            .and_then(|()| self.poller.add(&fd, token, false));
        if let Err(error) = ready {
            panic!("a listening socket cannot be polled: {error}");
        }
        self.listeners.push((fd, tls));
    }

    /// Lets an image go when all that it still had to say is said; its clients leave with it.
    fn forget(&mut self, channel: u32) {
        self.settle();
        self.images.remove(&channel);
        for index in self.clients_of(channel) {
            self.clients[index].leave();
            self.flush_client(index);
        }
    }

    fn disconnect(&mut self, channel: u32) {
        self.clients_of(channel).into_iter().for_each(|index| self.end_client(index));
    }

    /// Has an image's clients connect anew: what they have asked for is answered before.
    fn dismiss(&mut self, channel: u32) {
        for index in self.clients_of(channel) {
            self.read_client(index);
            if let Some(client) = self.clients.get_mut(index) {
                client.leave();
                self.flush_client(index);
            }
        }
    }

    fn clients_of(&self, channel: u32) -> Vec<usize> {
        let of_image = |client: &Client| client.channel() == Some(channel);
        let clients = self.clients.iter().filter(|(_, client)| of_image(client));
        clients.map(|(index, _)| index).collect()
    }

    fn zero(&mut self, channel: u32, offset: u64, length: u64) {
        if let Some(image) = self.images.get_mut(&channel) {
            image.zeroing = Some(Zeroing { at: offset, end: offset + length });
            step_zeroing(image, channel, true, &self.events);
            self.touch(channel);
        }
    }

    fn tick(&mut self) {
        let paused = self.now_ns.saturating_sub(self.next_tick_ns) > PAUSE_NS;
        self.next_tick_ns = self.now_ns + TICK_NS;
        for index in 0..self.links.capacity() {
            let Some(link) = self.links.get_mut(index) else { continue };
            link.tick(&self.poller, self.now_ns, paused, &mut self.link_events);
            if !self.link_events.is_empty() {
                self.take_link_events(index);
            }
        }
        let paced = self.images.iter().filter(|(_, image)| image.served.wants_pace());
        let paced: Vec<u32> = paced.map(|(channel, _)| *channel).collect();
        paced.into_iter().for_each(|channel| self.with_served(channel, Served::pace));
        if self.now_ns < self.next_image_tick_ns {
            return;
        }
        self.next_image_tick_ns = self.now_ns + IMAGE_TICK_NS;
        let channels: Vec<u32> = self.images.keys().copied().collect();
        channels.into_iter().for_each(|channel| self.with_image(channel, ImageIo::tick));
        let idle_ns = self.budget.limits.idle_ns;
        let (now_ns, scarce) = (self.now_ns, !self.held.is_empty());
        let is_late =
            |client: &Client| client.is_late(now_ns, idle_ns) || scarce && client.is_stuck(now_ns);
        let late = self.clients.iter().filter(|(_, client)| is_late(client));
        let late: Vec<usize> = late.map(|(index, _)| index).collect();
        late.into_iter().for_each(|index| self.end_client(index));
    }

    fn snapshot(&self) -> Snapshot {
        let links = self.links.iter().map(|(_, link)| LinkSnapshot {
            node: link.target().node.clone(),
            ready: link.is_ready(),
        });
        let clients = self
            .clients
            .iter()
            .map(|(_, client)| ClientSnapshot { id: client.id, channel: client.channel() });
        let images = self.images.iter().filter_map(|(channel, image)| {
            let io = image.served.image()?;
            Some(ImageSnapshot {
                channel: *channel,
                image: io.image().to_string(),
                running: io.is_running(),
                epoch: io.spec().epoch,
                generation: io.spec().generation,
                requests_in_flight: io.requests_in_flight(),
                replicas: io.replica_states(),
                heal: io.heal_state(),
                level: io.level_state(),
                scrub: io.scrub_state(),
                rot: io.rot_state(),
                counters: image.counters.clone(),
            })
        });
        let readers = self.images.iter().filter_map(|(channel, image)| {
            let io = image.served.reader()?;
            Some(ReaderSnapshot {
                channel: *channel,
                image: io.spec().image.to_string(),
                snapshot: io.spec().snapshot,
                running: io.is_running(),
                requests_in_flight: io.requests_in_flight(),
                nodes: io.node_states(),
                counters: image.counters.clone(),
            })
        });
        Snapshot {
            links: links.collect(),
            clients: clients.collect(),
            refused_clients: self.refused_clients,
            bytes_in_flight: self.budget.used(),
            images: images.collect(),
            readers: readers.collect(),
        }
    }
}

/// Goes on with zeroing a long range, or says that it is done.
fn step_zeroing(image: &mut OpenImage, channel: u32, done: bool, events: &EventQueue) {
    const STEP_BYTES: u64 = 1 << 30;
    let Some(zeroing) = &mut image.zeroing else { return };
    if !done || zeroing.at >= zeroing.end {
        image.zeroing = None;
        return events.push(GatewayEvent::Zeroed { channel, done });
    }
    let length = (zeroing.end - zeroing.at).min(STEP_BYTES);
    let at = zeroing.at;
    zeroing.at += length;
    debug_assert!(length <= u64::from(u32::MAX) / u64::from(BLOCK_BYTES) * u64::from(BLOCK_BYTES));
    image.served.zero(Token { client: NOBODY, cookie: 0 }, at, length as u32, 0);
}

fn instance_of(hello: &HelloReply) -> Instance {
    Instance { store: hello.store, start_counter: hello.start_counter }
}

/// Which instance answered, beside what it answered.
fn hello_for(event: &Event, links: &[Option<usize>], all: &Slab<Link>) -> Option<HelloReply> {
    let Event::Peeked { node, .. } = event else { return None };
    let link = links[usize::from(*node)]?;
    all.get(link).map(|link| link.hello.clone())
}
