//! The gateways of the simulated cluster: links, open images, and the requests of guests. Stands in for
//! `gateway::event_loop`, whose rules of links, heartbeats and ticks it keeps.

use super::network::{Item, Way};
use super::peers::address_of;
use super::world::{Action, Happening, MILLISECOND_NS, Span, World};
use crate::content::Run;
use crate::gateway::GatewayEvent;
use crate::replica::{
    Background, Event, ImageIo, Instance, IoError, NodeIndex, OpenSpec, Outcome, Output, ReaderIo,
    ReaderSpec, Served, Token,
};
use crate::wire::messages::HelloReply;
use crate::wire::{Frame, FrameReader, flag};
use bytes::{Bytes, BytesMut};
use std::collections::{BTreeMap, VecDeque};

pub const SECTOR_BYTES: usize = 512;
/// Stands for a sector that holds a mixture, or what no guest wrote.
pub const TORN: u64 = u64::MAX;

const SECOND_NS: u64 = 1000 * MILLISECOND_NS;
const TICK_NS: u64 = 100 * MILLISECOND_NS;
const IMAGE_TICK_NS: u64 = SECOND_NS;
const PAUSE_NS: u64 = 2 * SECOND_NS;
const PING_NS: u64 = SECOND_NS;
const LOST_NS: u64 = 4 * SECOND_NS;
const CONNECT_NS: u64 = 2 * SECOND_NS;
const RETRY_NS: u64 = SECOND_NS / 10;

/// What a guest asks, in sectors. Data is its stamp, over and over.
#[derive(Clone, Copy, Debug)]
pub enum GuestRequest {
    Read { first: u64, sectors: u32 },
    Write { first: u64, sectors: u32, stamp: u64, durable: bool },
    Zero { first: u64, sectors: u32, keep_allocated: bool, durable: bool },
    Flush,
}

/// What it hears.
#[derive(Clone, Debug)]
pub enum Answered {
    Done,
    /// The stamp of each sector.
    Read(Vec<u64>),
    /// EIO.
    Failed,
    /// ENOSPC.
    Full,
    /// The image is gone from this gateway.
    Shutdown,
}

#[derive(Clone, Copy)]
enum LinkState {
    Idle { retry_at_ns: u64 },
    Greeting { connection: u64, deadline_ns: u64 },
    Ready { connection: u64, heard_ns: u64, pinged_ns: u64 },
}

struct Link {
    node: usize,
    state: LinkState,
    hello: HelloReply,
}

struct Image {
    served: Served,
    /// The node of the cluster that each of its nodes is.
    nodes: Vec<usize>,
}

/// A gateway's process, or none.
pub(super) struct Gateway {
    pub run: u64,
    pub running: bool,
    pub paused: bool,
    held: Vec<Action>,
    links: Vec<Link>,
    images: BTreeMap<u32, Image>,
    background: Background,
    events: VecDeque<GatewayEvent>,
    told_ns: u64,
    next_tick_ns: u64,
    next_image_tick_ns: u64,
    /// How long an event is on its way to policy.
    telling: Span,
}

impl Default for Gateway {
    fn default() -> Gateway {
        Gateway {
            run: 0,
            running: false,
            paused: false,
            held: Vec::new(),
            links: Vec::new(),
            images: BTreeMap::new(),
            background: Background::default(),
            events: VecDeque::new(),
            told_ns: 0,
            next_tick_ns: 0,
            next_image_tick_ns: 0,
            telling: Span { min_ns: 0, max_ns: 2 * MILLISECOND_NS },
        }
    }
}

impl World {
    // Processes

    pub fn start_gateway(&mut self, gateway: usize) {
        let run = self.gateways[gateway].run + 1;
        assert!(!self.gateways[gateway].running, "one process at a time");
        self.gateways[gateway] = Gateway {
            run,
            running: true,
            next_tick_ns: self.now_ns,
            next_image_tick_ns: self.now_ns + IMAGE_TICK_NS,
            ..Gateway::default()
        };
        self.schedule(self.now_ns, Action::GatewayTick { gateway, run });
    }

    /// Ends a gateway's process; with `power` its host loses it, and says nothing to anybody.
    pub fn stop_gateway(&mut self, gateway: usize, power: bool) {
        let run = self.gateways[gateway].run + 1;
        self.gateways[gateway] = Gateway { run, ..Gateway::default() };
        let ids: Vec<u64> = self
            .connections
            .iter()
            .filter(|(_, c)| c.gateway == gateway && c.gateway_open)
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            self.end_at_gateway(id, power);
        }
    }

    pub fn pause_gateway(&mut self, gateway: usize) {
        self.gateways[gateway].paused = true;
    }

    pub fn continue_gateway(&mut self, gateway: usize) {
        self.gateways[gateway].paused = false;
        let held = std::mem::take(&mut self.gateways[gateway].held);
        held.into_iter().for_each(|action| self.schedule(self.now_ns, action));
        self.go_on_between(Some(gateway), None);
    }

    pub(super) fn gateway_action(&mut self, gateway: usize, run: u64, action: Action) {
        let slot = &mut self.gateways[gateway];
        if slot.run != run || !slot.running {
            return;
        }
        if slot.paused {
            return slot.held.push(action);
        }
        match action {
            Action::Tell { .. } => {
                if let Some(event) = slot.events.pop_front().map(Box::new) {
                    self.happenings.push_back(Happening::Event { gateway, event });
                }
            }
            _ => {
                self.tick(gateway);
                self.schedule(self.now_ns + TICK_NS, action);
            }
        }
    }

    fn tell(&mut self, gateway: usize, event: GatewayEvent) {
        let telling = self.gateways[gateway].telling;
        let at_ns = self.now_ns + self.within(telling);
        let slot = &mut self.gateways[gateway];
        slot.told_ns = slot.told_ns.max(at_ns);
        slot.events.push_back(event);
        let (at_ns, run) = (slot.told_ns, slot.run);
        self.schedule(at_ns, Action::Tell { gateway, run });
    }

    // Links

    /// Keeps a connection to this node.
    pub fn link(&mut self, gateway: usize, node: usize) {
        let links = &mut self.gateways[gateway].links;
        if links.iter().all(|link| link.node != node) {
            let state = LinkState::Idle { retry_at_ns: 0 };
            links.push(Link { node, state, hello: HelloReply::default() });
        }
    }

    fn tick(&mut self, gateway: usize) {
        let now_ns = self.now_ns;
        let slot = &mut self.gateways[gateway];
        let paused = now_ns.saturating_sub(slot.next_tick_ns) > PAUSE_NS;
        slot.next_tick_ns = now_ns + TICK_NS;
        for index in 0..slot.links.len() {
            self.tick_link(gateway, index, paused);
        }
        let images = &self.gateways[gateway].images;
        let healing = images.iter().filter(|(_, image)| image.served.wants_pace());
        let healing: Vec<u32> = healing.map(|(channel, _)| *channel).collect();
        for channel in healing {
            self.with_served(gateway, channel, Served::pace);
        }
        self.go_on_in_background(gateway);
        let slot = &mut self.gateways[gateway];
        if now_ns < slot.next_image_tick_ns {
            return;
        }
        slot.next_image_tick_ns = now_ns + IMAGE_TICK_NS;
        let channels: Vec<u32> = slot.images.keys().copied().collect();
        for channel in channels {
            self.with_image(gateway, channel, ImageIo::tick);
        }
    }

    fn tick_link(&mut self, gateway: usize, index: usize, paused: bool) {
        let now_ns = self.now_ns;
        let link = &mut self.gateways[gateway].links[index];
        let node = link.node;
        match &mut link.state {
            LinkState::Idle { retry_at_ns } if now_ns >= *retry_at_ns => {
                let connection = self.new_connection(gateway, node);
                let deadline_ns = now_ns + CONNECT_NS;
                self.gateways[gateway].links[index].state =
                    LinkState::Greeting { connection, deadline_ns };
                self.push(connection, Way::ToNode, Item::Hello);
            }
            LinkState::Idle { .. } => {}
            LinkState::Greeting { connection, deadline_ns } => {
                if now_ns > *deadline_ns {
                    let connection = *connection;
                    self.end_link(gateway, connection, "no answer while connecting");
                }
            }
            LinkState::Ready { connection, heard_ns, pinged_ns } => {
                let connection = *connection;
                if paused {
                    *heard_ns = (*heard_ns).max(now_ns - (LOST_NS - SECOND_NS).min(now_ns));
                }
                let silent_ns = now_ns.saturating_sub(*heard_ns);
                if silent_ns > LOST_NS {
                    self.end_link(gateway, connection, "silent for 4 s");
                } else if silent_ns >= PING_NS / 2 && now_ns - *pinged_ns >= PING_NS {
                    *pinged_ns = now_ns;
                    self.push(connection, Way::ToNode, Item::Ping);
                }
            }
        }
    }

    /// Breaks the connection between a gateway and a node, if there is one.
    pub fn reset(&mut self, gateway: usize, node: usize) {
        let links = &self.gateways[gateway].links;
        let state = links.iter().find(|link| link.node == node).map(|link| link.state);
        if let Some(LinkState::Ready { connection, .. }) = state {
            self.end_link(gateway, connection, "reset");
        }
    }

    /// The gateway gives a connection up.
    fn end_link(&mut self, gateway: usize, connection: u64, why: &str) {
        let retry_at_ns = self.now_ns + RETRY_NS;
        let of_connection = |link: &&mut Link| match link.state {
            LinkState::Idle { .. } => false,
            LinkState::Greeting { connection: id, .. }
            | LinkState::Ready { connection: id, .. } => id == connection,
        };
        let Some(link) = self.gateways[gateway].links.iter_mut().find(of_connection) else {
            return;
        };
        let was_ready = matches!(link.state, LinkState::Ready { .. });
        let node = link.node;
        link.state = LinkState::Idle { retry_at_ns };
        self.end_at_gateway(connection, false);
        if was_ready {
            self.for_images_of(gateway, node, |served, index| served.link_down(index));
            let (node, why) = (self.nodes[node].sim.name.clone(), why.to_owned());
            self.tell(gateway, GatewayEvent::LinkDown { node, why });
        }
    }

    /// What was sent may still arrive; what comes back is not heard.
    fn end_at_gateway(&mut self, id: u64, power: bool) {
        let Some(connection) = self.connections.get(&id) else { return };
        let keep = self.random.below(connection.to_node.len() as u64 + 1) as usize;
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.gateway_open = false;
            connection.to_gateway.truncate(0);
            connection.to_node.truncate(keep);
            connection.to_node.scheduled &= !connection.to_node.is_empty();
        }
        if !power {
            self.push(id, Way::ToNode, Item::Close);
        }
    }

    pub(super) fn gateway_receives(&mut self, id: u64, item: Item) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let (gateway, node) = (connection.gateway, connection.node);
        let known = connection.gateway_run == self.gateways[gateway].run;
        if !known || !connection.gateway_open {
            return connection.to_gateway.truncate(0);
        }
        let now_ns = self.now_ns;
        let Some(link) = self.gateways[gateway].links.iter_mut().find(|link| link.node == node)
        else {
            return;
        };
        if let LinkState::Ready { heard_ns, .. } = &mut link.state {
            *heard_ns = now_ns;
        }
        match item {
            Item::Greeting(hello) => {
                let (instance, boot) = (instance_of(&hello), hello.boot);
                link.hello = hello.clone();
                link.state =
                    LinkState::Ready { connection: id, heard_ns: now_ns, pinged_ns: now_ns };
                self.for_images_of(gateway, node, |served, index| {
                    served.link_up(index, instance, boot);
                });
                self.tell(gateway, GatewayEvent::LinkUp { hello });
            }
            Item::Close => self.end_link(gateway, id, "closed by the node"),
            Item::Frame(frame) => self.gateway_takes(gateway, node, id, frame),
            Item::Hello | Item::Ping | Item::Pong => {}
        }
        self.go_on_in_background(gateway);
    }

    /// Work in the background that waits for its turn goes on where there is room.
    fn go_on_in_background(&mut self, gateway: usize) {
        for _ in 0..self.gateways[gateway].background.waiting() {
            let Some(channel) = self.gateways[gateway].background.offer(self.now_ns) else {
                return;
            };
            self.with_image(gateway, channel, ImageIo::pace);
            self.gateways[gateway].background.offer_over();
        }
    }

    fn gateway_takes(&mut self, gateway: usize, node: usize, connection: u64, frame: Frame) {
        let now_ns = self.now_ns;
        let channel = frame.channel;
        let Some(image) = self.gateways[gateway].images.get_mut(&channel) else { return };
        let Some(index) = image.nodes.iter().position(|other| *other == node) else { return };
        image.served.set_now(now_ns);
        if let Err(bad) = image.served.receive(index as NodeIndex, frame) {
            self.end_link(gateway, connection, &format!("protocol error: {}", bad.0));
        }
        self.settle_image(gateway, channel);
    }

    // Images

    /// Begins with an image.
    pub fn open(&mut self, gateway: usize, spec: OpenSpec) {
        let channel = spec.channel;
        let io = ImageIo::new(spec, &self.gateways[gateway].background);
        self.serve(gateway, channel, Served::Image(Box::new(io)));
    }

    /// Begins with a reader of frozen layers.
    pub fn open_reader(&mut self, gateway: usize, spec: ReaderSpec) {
        let channel = spec.channel;
        let io = ReaderIo::new(spec, self.now_ns);
        self.serve(gateway, channel, Served::Reader(Box::new(io)));
    }

    fn serve(&mut self, gateway: usize, channel: u32, mut served: Served) {
        let places = served.nodes().iter().map(|name| {
            let found = self.nodes.iter().position(|node| node.sim.name == *name);
            found.expect("an image lies on nodes of the cluster")
        });
        let nodes: Vec<usize> = places.collect();
        for (index, node) in nodes.iter().enumerate() {
            served.set_address(index as NodeIndex, Some(address_of(*node)));
            let link = self.gateways[gateway].links.iter().find(|link| link.node == *node);
            if let Some(link) = link.filter(|l| matches!(l.state, LinkState::Ready { .. })) {
                served.link_up(index as NodeIndex, instance_of(&link.hello), link.hello.boot);
            }
        }
        self.gateways[gateway].images.insert(channel, Image { served, nodes });
        self.settle_image(gateway, channel);
    }

    /// Drops an image that is closed or killed.
    pub fn forget(&mut self, gateway: usize, channel: u32) {
        self.gateways[gateway].images.remove(&channel);
    }

    /// Has an image do something. False: the gateway has none of this channel.
    pub fn with_image(
        &mut self,
        gateway: usize,
        channel: u32,
        act: impl FnOnce(&mut ImageIo),
    ) -> bool {
        self.with_served(gateway, channel, |served| {
            if let Some(io) = served.image_mut() {
                act(io);
            }
        })
    }

    /// Has an image, or a reader, do something. False: the gateway has none of this channel.
    pub fn with_served(
        &mut self,
        gateway: usize,
        channel: u32,
        act: impl FnOnce(&mut Served),
    ) -> bool {
        let now_ns = self.now_ns;
        let Some(image) = self.gateways[gateway].images.get_mut(&channel) else { return false };
        image.served.set_now(now_ns);
        act(&mut image.served);
        self.settle_image(gateway, channel);
        true
    }

    pub fn image(&self, gateway: usize, channel: u32) -> Option<&ImageIo> {
        self.gateways[gateway].images.get(&channel)?.served.image()
    }

    pub(super) fn reader(&self, gateway: usize, channel: u32) -> Option<&ReaderIo> {
        self.gateways[gateway].images.get(&channel)?.served.reader()
    }

    /// A guest's request. False: the gateway has no image of this channel, and ends the connection.
    pub fn submit(
        &mut self,
        gateway: usize,
        channel: u32,
        token: Token,
        request: GuestRequest,
    ) -> bool {
        let bytes = |sectors: u32| sectors * SECTOR_BYTES as u32;
        let at = |first: u64| first * SECTOR_BYTES as u64;
        let fua = |durable: bool| if durable { flag::FUA } else { 0 };
        self.with_served(gateway, channel, |io| match request {
            GuestRequest::Read { first, sectors } => io.read(token, at(first), bytes(sectors)),
            GuestRequest::Write { first, sectors, stamp, durable } => {
                let data = stamp.to_le_bytes().repeat(bytes(sectors) as usize / 8);
                io.write(token, at(first), Bytes::from(data), fua(durable));
            }
            GuestRequest::Zero { first, sectors, keep_allocated, durable } => {
                let keep = if keep_allocated { flag::KEEP_ALLOCATED } else { 0 };
                io.zero(token, at(first), bytes(sectors), keep | fua(durable));
            }
            GuestRequest::Flush => io.flush(token),
        })
    }

    fn for_images_of(
        &mut self,
        gateway: usize,
        node: usize,
        mut act: impl FnMut(&mut Served, NodeIndex),
    ) {
        let now_ns = self.now_ns;
        let mut touched = Vec::new();
        for (channel, image) in &mut self.gateways[gateway].images {
            if let Some(index) = image.nodes.iter().position(|other| *other == node) {
                image.served.set_now(now_ns);
                act(&mut image.served, index as NodeIndex);
                touched.push(*channel);
            }
        }
        touched.into_iter().for_each(|channel| self.settle_image(gateway, channel));
    }

    /// Carries out what an image wants.
    fn settle_image(&mut self, gateway: usize, channel: u32) {
        loop {
            let slot = &mut self.gateways[gateway];
            let Some(image) = slot.images.get_mut(&channel) else { return };
            let Some(output) = image.served.take_output() else {
                return image.served.report_background();
            };
            match output {
                Output::Send { node, head, payload } => {
                    let node = image.nodes[usize::from(node)];
                    let link = slot.links.iter().find(|link| link.node == node);
                    if let Some(LinkState::Ready { connection, .. }) = link.map(|l| l.state) {
                        let mut bytes = BytesMut::from(&head[..]);
                        bytes.extend_from_slice(&payload);
                        let frame = FrameReader::next(&mut bytes).expect("our own frame");
                        let frame = Item::Frame(frame.expect("a whole frame"));
                        self.push(connection, Way::ToNode, frame);
                    }
                }
                Output::Answer { token: Token { client, cookie }, outcome } => {
                    let answered = answered(outcome);
                    self.note([self.now_ns, client, cookie]);
                    self.happenings.push_back(Happening::Answer {
                        gateway,
                        client,
                        cookie,
                        answered,
                    });
                }
                Output::Event(event) => {
                    if matches!(event, Event::Admitted { .. } | Event::Levelled { .. }) {
                        self.note_level(gateway, channel);
                    }
                    if let Event::Healed { node, .. } = event {
                        self.note_healed(gateway, channel, node);
                    }
                    let slot = &self.gateways[gateway];
                    let Some(image) = slot.images.get(&channel) else { return };
                    let hello = match &event {
                        Event::Peeked { node, .. } => {
                            let node = image.nodes[usize::from(*node)];
                            let link = slot.links.iter().find(|link| link.node == node);
                            link.map(|link| link.hello.clone())
                        }
                        _ => None,
                    };
                    self.tell(gateway, GatewayEvent::Image { channel, event, hello });
                }
            }
        }
    }

    /// A healed node has by copies what others applied before: also a part of a request that is not
    /// answered yet because another part waits.
    fn note_healed(&mut self, gateway: usize, channel: u32, node: NodeIndex) {
        let Some(image) = self.gateways[gateway].images.get(&channel) else { return };
        let node = image.nodes[usize::from(node)];
        self.applied.values_mut().for_each(|nodes| *nodes |= 1 << node);
    }

    /// The replicas of an image are level: those that run on remember what they have.
    fn note_level(&mut self, gateway: usize, channel: u32) {
        let slot = &self.gateways[gateway];
        let Some(image) = slot.images.get(&channel) else { return };
        let Some(io) = image.served.image() else { return };
        for index in io.whole().iter() {
            let node = image.nodes[usize::from(index)];
            let link = slot.links.iter().find(|link| link.node == node);
            let process = self.nodes[node].sim.run.as_ref();
            if let (Some(link), Some(process)) = (link, process)
                && instance_of(&link.hello) == process.instance()
            {
                self.remembers.insert((node, io.image()));
            }
        }
    }
}

fn instance_of(hello: &HelloReply) -> Instance {
    Instance { store: hello.store, start_counter: hello.start_counter }
}

fn answered(outcome: Outcome) -> Answered {
    match outcome {
        Outcome::Done | Outcome::Extents(_) | Outcome::Shards(_) => Answered::Done,
        Outcome::Failed(IoError::Io) => Answered::Failed,
        Outcome::Failed(IoError::NoSpace) => Answered::Full,
        Outcome::Failed(IoError::Shutdown) => Answered::Shutdown,
        Outcome::Read(runs) => {
            let mut content = Vec::new();
            for run in runs {
                match run {
                    Run::Data(data) => content.extend_from_slice(&data),
                    Run::Hole(length) => content.resize(content.len() + length as usize, 0),
                }
            }
            Answered::Read(content.chunks(SECTOR_BYTES).map(stamp_of).collect())
        }
    }
}

pub(super) fn stamp_of(sector: &[u8]) -> u64 {
    let Some(first) = sector.first_chunk::<8>() else { return TORN };
    let whole = sector.len() == SECTOR_BYTES && sector.chunks_exact(8).all(|word| word == first);
    if whole { u64::from_le_bytes(*first) } else { TORN }
}
