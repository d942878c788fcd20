//! What both daemons' event loops share: readiness, buffered streams, clocks. Level-triggered epoll and
//! plain reads and writes; `docs/decisions/` says why.

mod memory;
mod outgoing;
mod peer;
mod poller;
mod stream;
mod tls;

pub use memory::{SharedMemory, Slot, Slots};
pub use outgoing::{Outgoing, Sink};
pub use peer::{peer_process, tune_accepted};
pub use poller::{Poller, Ready, Waker};
pub use stream::{Address, Filled, Stream, listen_tcp, listen_unix};
pub use tls::{BadCredentials, TlsConfig};

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds on the clock that runs through suspend (lease times count on it).
pub fn boottime_ns() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
