//! Readiness of file descriptors, and a way to wake a sleeping loop from another thread.

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::fd::{AsFd, OwnedFd};
use std::io;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::time::Duration;

/// One descriptor that is ready.
#[derive(Clone, Copy, Debug)]
pub struct Ready {
    pub token: u64,
    pub readable: bool,
    pub writable: bool,
    /// The peer is gone for good: it takes no answer any more. Told also to who wants neither to
    /// read nor to write, and again at once until the descriptor is closed.
    pub gone: bool,
}

/// An epoll instance.
pub struct Poller {
    epoll: OwnedFd,
}

/// Most descriptors that one wait reports; the others are reported by the next.
const EVENTS_MAX: usize = 128;

impl Poller {
    pub fn new() -> io::Result<Poller> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        Ok(Poller { epoll })
    }

    pub fn add(&self, fd: impl AsFd, token: u64, writable: bool) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, EventData::new_u64(token), interest(true, writable))?)
    }

    pub fn change(
        &self,
        fd: impl AsFd,
        token: u64,
        readable: bool,
        writable: bool,
    ) -> io::Result<()> {
        let flags = interest(readable, writable);
        Ok(epoll::modify(&self.epoll, fd, EventData::new_u64(token), flags)?)
    }

    pub fn remove(&self, fd: impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&self.epoll, fd)?)
    }

    /// Waits at most `timeout` and appends what is ready to `ready`.
    pub fn wait(&self, timeout: Duration, ready: &mut Vec<Ready>) -> io::Result<()> {
        let timeout = Timespec {
            tv_sec: timeout.as_secs() as i64,
            tv_nsec: i64::from(timeout.subsec_nanos()),
        };
        let mut events = [const { MaybeUninit::<Event>::uninit() }; EVENTS_MAX];
        let events = match epoll::wait(&self.epoll, &mut events, Some(&timeout)) {
            Ok((events, _)) => events,
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        ready.extend(events.iter().map(|event| {
            let flags = event.flags;
            let ended = flags.intersects(EventFlags::ERR | EventFlags::HUP | EventFlags::RDHUP);
            Ready {
                token: event.data.u64(),
                readable: flags.contains(EventFlags::IN) || ended,
                writable: flags.contains(EventFlags::OUT) || flags.contains(EventFlags::ERR),
                gone: flags.intersects(EventFlags::ERR | EventFlags::HUP),
            }
        }));
        Ok(())
    }
}

fn interest(readable: bool, writable: bool) -> EventFlags {
    let mut flags = EventFlags::empty();
    flags.set(EventFlags::IN, readable);
    flags.set(EventFlags::OUT, writable);
    flags
}

/// Wakes the loop that polls it. Cheap to clone.
#[derive(Clone)]
pub struct Waker(Arc<OwnedFd>);

impl Waker {
    /// Registers with `poller` under `token`.
    pub fn new(poller: &Poller, token: u64) -> io::Result<Waker> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        poller.add(&fd, token, false)?;
        Ok(Waker(Arc::new(fd)))
    }

    pub fn wake(&self) {
        // A full counter means that the loop is being woken already.
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }

    pub fn drain(&self) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&*self.0, &mut count);
    }
}
