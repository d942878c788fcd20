//! Readiness of file descriptors, and a way to wake a sleeping loop from another thread.

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::fd::{AsFd, OwnedFd};
use std::cell::Cell;
use std::io;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::time::{Duration, Instant};

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
    polling: Cell<Polling>,
}

/// How long a loop looks for something to do before it sleeps: what comes within that time needs no wake-up,
/// which costs more than the work of a small request. As halt polling of KVM (Documentation/virt/kvm/
/// halt-polling.rst) it adapts: a wait that was short has the next one look longer, one that was long
/// has it look for half as long, so that a loop with little to do burns nothing.
#[derive(Clone, Copy, Debug)]
struct Polling {
    most: Duration,
    present: Duration,
}

/// What a loop begins with that had long waits.
const POLLING_LEAST: Duration = Duration::from_micros(10);

impl Polling {
    /// A wait took so long, from its beginning, polling included.
    fn waited(&mut self, time: Duration) {
        self.present = match time <= self.most {
            true => (self.present * 2).clamp(POLLING_LEAST.min(self.most), self.most),
            false if self.present >= POLLING_LEAST * 2 => self.present / 2,
            false => Duration::ZERO,
        };
    }
}

/// Most descriptors that one wait reports; the others are reported by the next.
const EVENTS_MAX: usize = 128;

impl Poller {
    /// One that sleeps at once where nothing is ready.
    pub fn new() -> io::Result<Poller> {
        Poller::polling(Duration::ZERO)
    }

    /// One that polls for so long at most before it sleeps, while its waits are short.
    pub fn polling(most: Duration) -> io::Result<Poller> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let polling = Cell::new(Polling { most, present: Duration::ZERO });
        Ok(Poller { epoll, polling })
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
        let mut polling = self.polling.get();
        if polling.most.is_zero() {
            return self.take(timeout, ready);
        }
        let began = Instant::now();
        let before = ready.len();
        let polls = polling.present.min(timeout);
        while !polls.is_zero() {
            self.take(Duration::ZERO, ready)?;
            if ready.len() > before || began.elapsed() >= polls {
                break;
            }
            // Whoever else would run here goes first: it may be who we wait for.
            rustix::thread::sched_yield();
        }
        if ready.len() == before {
            self.take(timeout, ready)?;
        }
        polling.waited(began.elapsed());
        self.polling.set(polling);
        Ok(())
    }

    fn take(&self, timeout: Duration, ready: &mut Vec<Ready>) -> io::Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: Duration = Duration::from_micros(100);

    fn after(waits: &[u64]) -> Duration {
        let mut polling = Polling { most: MOST, present: Duration::ZERO };
        waits.iter().for_each(|us| polling.waited(Duration::from_micros(*us)));
        polling.present
    }

    #[test]
    fn short_waits_have_it_poll_longer_up_to_the_most() {
        assert_eq!(after(&[]), Duration::ZERO);
        assert_eq!(after(&[100]), POLLING_LEAST);
        assert_eq!(after(&[50, 50]), POLLING_LEAST * 2);
        assert_eq!(after(&[50; 20]), MOST);
    }

    #[test]
    fn long_waits_end_it_within_a_few() {
        let mut waits = vec![50; 20];
        waits.extend([101; 4]);
        assert_eq!(after(&waits), Duration::ZERO);
    }

    #[test]
    fn what_is_ready_is_told_whether_it_polls_or_sleeps() {
        for most in [Duration::ZERO, MOST, Duration::from_secs(1)] {
            let poller = Poller::polling(most).expect("an epoll");
            let waker = Waker::new(&poller, 7).expect("an eventfd");
            for round in 0..20 {
                let other = waker.clone();
                let wakes = std::thread::spawn(move || {
                    std::thread::sleep(Duration::from_micros(if round % 2 == 0 { 0 } else { 500 }));
                    other.wake();
                });
                let mut ready = Vec::new();
                poller.wait(Duration::from_secs(5), &mut ready).expect("a wait");
                assert_eq!(ready.iter().map(|ready| ready.token).collect::<Vec<_>>(), [7]);
                waker.drain();
                wakes.join().expect("it woke us");
            }
            let mut ready = Vec::new();
            let began = Instant::now();
            poller.wait(Duration::from_millis(5), &mut ready).expect("a wait");
            assert!(ready.is_empty() && began.elapsed() >= Duration::from_millis(5));
        }
    }
}
