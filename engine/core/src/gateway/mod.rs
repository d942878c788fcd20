//! The gateway's data path: one event loop that owns NBD clients, links to nodes, and open images.
//! Python talks to it through `Command`s and hears of it through `GatewayEvent`s; no request of a
//! client ever waits for Python.

mod event_loop;
mod snapshot;

pub use snapshot::{ClientSnapshot, ImageSnapshot, LinkSnapshot, ReaderSnapshot, Snapshot};

use crate::io::{Poller, TlsConfig, Waker};
use crate::nbd::budget::ClientLimits;
use crate::nbd::{Answer, Query, TlsMode};
use crate::replica::{
    Event, HealSpec, Layering, LinkTarget, NodeIndex, NodeMask, OpenSpec, ReaderSpec, ScrubSpec,
};
use crate::wire::messages::HelloReply;
use bytes::Bytes;
use event_loop::EventLoop;
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

/// What Python orders. `channel` names an open image.
pub enum Command {
    /// Accept NBD clients on this listening socket.
    Listen(OwnedFd, TlsMode),
    /// Connections that begin with TLS from now on show these certificates.
    Tls(TlsConfig),
    /// Go by these limits from now on.
    Limit(ClientLimits),
    /// Keep a connection to this node (in place of an older one of the same name).
    Link(LinkTarget),
    Unlink(String),
    /// Begin with an image: its nodes are asked for their records, nothing is served yet.
    Open(OpenSpec),
    /// Begin with a reader of frozen layers; `Event::ReaderOpen` or `Event::ReaderFailed` tells how it went.
    OpenReader(ReaderSpec),
    Peek {
        channel: u32,
        node: NodeIndex,
    },
    Admit {
        channel: u32,
        nodes: Vec<(NodeIndex, u64)>,
        resume: bool,
    },
    RefuseWrites {
        channel: u32,
        sets: Vec<usize>,
    },
    Reconfigure {
        channel: u32,
        generation: u64,
        digest: [u8; 32],
        body: Bytes,
        in_sync: Vec<NodeMask>,
        layering: Layering,
    },
    /// Ask the nodes which merging layers they have emptied; each answers with `Event::Emptied`.
    AskEmptied {
        channel: u32,
    },
    /// Have clients' changes wait for a snapshot; `Event::Frozen` or `Event::FreezeFailed` tells how it went.
    Freeze {
        channel: u32,
        attempt: u64,
    },
    Thaw {
        channel: u32,
        attempt: u64,
    },
    /// Make a stale node level; `Event::Healed` or `Event::HealFailed` tells how it went.
    Heal {
        channel: u32,
        spec: HealSpec,
    },
    EndHeal {
        channel: u32,
        attempt: u64,
    },
    /// What the holder before answered in these replica sets may be gone, and its clients are still here.
    WritesLost {
        channel: u32,
        sets: Vec<usize>,
    },
    /// Read and compare everything; `Event::ScrubEnded` tells how it went.
    Scrub {
        channel: u32,
        spec: ScrubSpec,
    },
    EndScrub {
        channel: u32,
        attempt: u64,
    },
    LeaseDeadline {
        channel: u32,
        deadline_ns: u64,
    },
    /// Flush, clear, let go, or end a reader; `Event::Closed` tells how it went.
    Close {
        channel: u32,
    },
    /// End an image at once; its requests fail.
    Kill {
        channel: u32,
    },
    /// Forget an image that is closed or killed.
    Forget {
        channel: u32,
    },
    /// Let new connections wait in the socket.
    StopListening,
    /// End the connections of an image's clients; what they have in flight is not answered.
    Disconnect {
        channel: u32,
    },
    /// End the connections of an image's clients, each when what it has asked for is answered.
    Reconnect {
        channel: u32,
    },
    /// An image's new size, and the record that says so.
    Resize {
        channel: u32,
        size_bytes: u64,
        body: Bytes,
    },
    /// Make a range read as zeroes (what a shrink cuts off), then `GatewayEvent::Zeroed`.
    Zero {
        channel: u32,
        offset: u64,
        length: u64,
    },
    /// Answer a client's query; with `channel` it is served from that image.
    Answer {
        client: u64,
        answer: Answer,
        channel: Option<u32>,
    },
    Snapshot(mpsc::Sender<Snapshot>),
    Stop,
}

/// What Python hears.
#[derive(Debug)]
pub enum GatewayEvent {
    /// A client's handshake needs an answer.
    Asked {
        client: u64,
        /// See `io::peer_process`.
        peer: Option<String>,
        /// Came by a listener without TLS, whose clients nobody asks who they are.
        trusted: bool,
        /// The certificate that it has shown over TLS, in DER.
        certificate: Option<Bytes>,
        query: Query,
    },
    /// A client's TLS handshake failed.
    TlsRefused {
        why: String,
    },
    /// A client that was served from `channel`, or had a query under way, is gone.
    ClientGone {
        client: u64,
        channel: Option<u32>,
    },
    Image {
        channel: u32,
        event: Event,
        hello: Option<HelloReply>,
    },
    LinkUp {
        hello: HelloReply,
    },
    LinkDown {
        node: String,
        why: String,
    },
    Zeroed {
        channel: u32,
        done: bool,
    },
}

/// Events on their way to Python. Bounded by what causes them: clients, links and images.
#[derive(Default)]
pub struct EventQueue {
    events: Mutex<VecDeque<GatewayEvent>>,
    arrived: Condvar,
}

impl EventQueue {
    fn lock(&self) -> MutexGuard<'_, VecDeque<GatewayEvent>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, event: GatewayEvent) {
        self.lock().push_back(event);
        self.arrived.notify_one();
    }

    /// The next event, or none within `timeout`.
    pub fn next(&self, timeout: Duration) -> Option<GatewayEvent> {
        let waiting = self.arrived.wait_timeout_while(self.lock(), timeout, |q| q.is_empty());
        waiting.unwrap_or_else(PoisonError::into_inner).0.pop_front()
    }
}

/// A running gateway. Dropping it stops it.
pub struct Gateway {
    commands: mpsc::Sender<Command>,
    waker: Waker,
    events: Arc<EventQueue>,
    thread: Option<JoinHandle<()>>,
}

impl Gateway {
    /// Starts the event loop in a thread of its own. It polls for `poll` at most before it sleeps.
    pub fn start(poll: Duration) -> io::Result<Gateway> {
        let poller = Poller::polling(poll)?;
        let waker = Waker::new(&poller, event_loop::WAKER)?;
        let (commands, received) = mpsc::channel();
        let events = Arc::new(EventQueue::default());
        let event_loop = EventLoop::new(poller, waker.clone(), received, events.clone());
        let thread = std::thread::Builder::new().name("gateway".into());
        let thread = Some(thread.spawn(move || event_loop.run())?);
        Ok(Gateway { commands, waker, events, thread })
    }

    /// Orders something. After the loop has ended, nothing happens.
    pub fn order(&self, command: Command) {
        if self.commands.send(command).is_ok() {
            self.waker.wake();
        }
    }

    /// Where events come out.
    pub fn event_source(&self) -> Arc<EventQueue> {
        self.events.clone()
    }

    /// A picture of links, images and clients; none where the loop has ended.
    pub fn snapshot(&self) -> Option<Snapshot> {
        let (sender, receiver) = mpsc::channel();
        self.order(Command::Snapshot(sender));
        receiver.recv_timeout(Duration::from_secs(5)).ok()
    }

    /// Whether the loop still runs; it ends only by `stop`, or by a defect.
    pub fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    pub fn stop(&mut self) {
        self.order(Command::Stop);
        if let Some(thread) = self.thread.take() {
            // A panic of the loop was printed where it happened.
            let _ = thread.join();
        }
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};

    /// Answers each question for a list with 100 KB of names, as long as one comes within `patience`.
    fn answer_lists(gateway: &Gateway, patience: Duration) -> usize {
        let events = gateway.event_source();
        let mut answered = 0;
        while let Some(GatewayEvent::Asked { client, .. }) = events.next(patience) {
            let answer = Answer::Names(vec!["p/".repeat(500); 100]);
            gateway.order(Command::Answer { client, answer, channel: None });
            answered += 1;
        }
        answered
    }

    /// Lists that nobody took were all kept; and once they were bounded by not reading the client, the
    /// questions that it had already sent were never answered.
    #[test]
    fn a_client_that_takes_no_lists_is_held_back_and_answered_later() {
        const ASKED: usize = 60;
        let path = std::env::temp_dir().join(format!("hci-lists-{}", std::process::id()));
        let listener = UnixListener::bind(&path).expect("a socket");
        let gateway = Gateway::start(Duration::ZERO).expect("a gateway");
        gateway.order(Command::Listen(listener.into(), TlsMode::Off));
        let mut client = UnixStream::connect(&path).expect("it listens");
        std::fs::remove_file(&path).expect("it was there");
        client.read_exact(&mut [0; 18]).expect("a greeting");
        let list = b"IHAVEOPT\0\0\0\x03\0\0\0\0";
        client.write_all(&[&b"\0\0\0\x03"[..], &list.repeat(ASKED)].concat()).expect("it reads");
        let before = answer_lists(&gateway, Duration::from_secs(2));
        assert!((1..30).contains(&before), "{before} lists were kept");
        let taker = std::thread::spawn(move || {
            let mut left = ASKED * (100 * (20 + 4 + 1000) + 20);
            let mut buffer = vec![0; 1 << 20];
            while left > 0 {
                left -= client.read(&mut buffer).expect("more");
            }
        });
        let after = answer_lists(&gateway, Duration::from_secs(5));
        assert_eq!(before + after, ASKED);
        taker.join().expect("all were sent");
    }

    /// While policy looks for the answer, a client is not read. One that left meanwhile was noticed only
    /// with the answer, and until then the kernel told of it without pause: the loop took a whole core.
    #[test]
    fn a_client_that_leaves_before_its_answer_is_gone_at_once() {
        let path = std::env::temp_dir().join(format!("hci-gateway-{}", std::process::id()));
        let listener = UnixListener::bind(&path).expect("a socket");
        let gateway = Gateway::start(Duration::ZERO).expect("a gateway");
        gateway.order(Command::Listen(listener.into(), TlsMode::Off));
        let mut client = UnixStream::connect(&path).expect("it listens");
        std::fs::remove_file(&path).expect("it was there");
        client.read_exact(&mut [0; 18]).expect("a greeting");
        let go = b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x09\0\0\0\x03p/i\0\0";
        client.write_all(go).expect("it reads");
        let events = gateway.event_source();
        let asked = events.next(Duration::from_secs(20));
        assert!(matches!(asked, Some(GatewayEvent::Asked { .. })), "{asked:?}");
        drop(client);
        let gone = events.next(Duration::from_secs(20));
        assert!(matches!(gone, Some(GatewayEvent::ClientGone { .. })), "{gone:?}");
    }
}
