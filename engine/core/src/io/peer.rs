//! Who is at the other end of a connection, and whether it is still there.

use rustix::fd::AsFd;
use rustix::net::sockopt;
use std::time::Duration;

/// A peer's host that says nothing for about a minute is gone: otherwise a host that lost its power
/// would keep what it has open here for ever.
const IDLE: Duration = Duration::from_secs(30);
const PROBE: Duration = Duration::from_secs(10);
const PROBES: u32 = 3;
const UNACKNOWLEDGED_MS: u32 = 60_000;

/// Sets an accepted connection up: answers are not delayed, and a dead host is noticed. On a unix socket
/// there is nothing to set, and the calls fail without effect.
pub fn tune_accepted(fd: impl AsFd) {
    let _ = sockopt::set_tcp_nodelay(&fd, true);
    let _ = sockopt::set_tcp_keepidle(&fd, IDLE);
    let _ = sockopt::set_tcp_keepintvl(&fd, PROBE);
    let _ = sockopt::set_tcp_keepcnt(&fd, PROBES);
    let _ = sockopt::set_tcp_user_timeout(&fd, UNACKNOWLEDGED_MS);
    let _ = sockopt::set_socket_keepalive(&fd, true);
}

/// The process that connected over a unix socket, as `PID:START`: its id and its start time in ticks
/// since boot (proc(5), `stat`, field 22), which together no other process of this boot has. None over
/// TCP, and where the process is gone.
pub fn peer_process(fd: impl AsFd) -> Option<String> {
    let pid = sockopt::socket_peercred(&fd).ok()?.pid.as_raw_nonzero();
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is a name in brackets that may hold anything.
    let after_name = &stat[stat.rfind(')')? + 1..];
    let start = after_name.split_ascii_whitespace().nth(19)?;
    Some(format!("{pid}:{start}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn peer_of_a_unix_socket_is_its_process_and_start() {
        let (ours, _theirs) = UnixStream::pair().expect("a pair");
        tune_accepted(&ours);
        let peer = peer_process(&ours).expect("ourselves");
        let (pid, start) = peer.split_once(':').expect("two parts");
        assert_eq!(pid.parse(), Ok(std::process::id()));
        assert!(start.parse::<u64>().expect("ticks") > 0);
    }

    #[test]
    fn peer_over_tcp_is_nobody_we_know() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let _client = std::net::TcpStream::connect(listener.local_addr().expect("its address"));
        let (accepted, _) = listener.accept().expect("the client");
        tune_accepted(&accepted);
        assert_eq!(peer_process(&accepted), None);
        assert_eq!(sockopt::socket_keepalive(&accepted), Ok(true));
    }
}
