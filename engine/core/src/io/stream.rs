//! A non-blocking connection with what was read and what waits to be written.

use super::tls::{Tls, TlsConfig};
use super::{Outgoing, Sink};
use bytes::{BufMut, Bytes, BytesMut};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, ipproto,
    recvmsg, sendmsg, socket_with, sockopt,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// Room asked for before a read: several small requests, or the start of a large one.
const READ_BYTES: usize = 128 * 1024;
const WRITE_SLICES: usize = 64;

/// Where a listener is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// What a read found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filled {
    /// All that was there has been read.
    Drained,
    /// There may be more.
    More,
    /// The peer has closed.
    Closed,
}

/// One connection. Dropping it closes it.
pub struct Stream {
    fd: OwnedFd,
    pub input: BytesMut,
    output: Outgoing,
    writing: bool,
    reading: bool,
    /// Whether descriptors are taken from the peer, and the last that came.
    takes_descriptors: bool,
    descriptor: Option<OwnedFd>,
    tls: Option<Box<Tls>>,
}

impl Stream {
    /// Takes over a connected (or connecting) non-blocking socket.
    pub fn new(fd: OwnedFd) -> Stream {
        Stream {
            fd,
            input: BytesMut::new(),
            output: Outgoing::new(),
            writing: false,
            reading: true,
            takes_descriptors: false,
            descriptor: None,
            tls: None,
        }
    }

    /// Goes on under TLS, as its server; whatever waits goes out before.
    ///
    /// # Errors
    /// It does not go out at once, or the peer has already sent more: it might be somebody else's.
    pub fn start_tls(&mut self, config: &TlsConfig) -> io::Result<()> {
        self.flush()?;
        if !self.output.is_empty() || !self.input.is_empty() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        self.tls = Some(Box::new(Tls::new(config)?));
        Ok(())
    }

    /// Says goodbye where the protocol has a word for it: the connection is about to be closed.
    pub fn end(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.close(&self.fd);
        }
    }

    /// Whether the peer has yet to show who it is.
    pub fn is_in_tls_handshake(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.is_handshaking())
    }

    /// The certificate that the peer has shown, in DER.
    pub fn peer_certificate(&self) -> Option<Bytes> {
        self.tls.as_ref()?.peer_certificate()
    }

    /// Takes over a socket whose peer, if it is a process of this host, may send a descriptor.
    pub fn accepted(fd: OwnedFd) -> Stream {
        let takes_descriptors = sockopt::socket_domain(&fd) == Ok(AddressFamily::UNIX);
        Stream { takes_descriptors, ..Stream::new(fd) }
    }

    /// Begins to connect; writability tells the end of it, `connected` its outcome.
    pub fn connect(address: &Address) -> io::Result<Stream> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (fd, started) = match address {
            Address::Tcp(address) => {
                let family =
                    if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
                let fd = socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))?;
                sockopt::set_tcp_nodelay(&fd, true)?;
                let started = connect(&fd, address);
                (fd, started)
            }
            Address::Unix(path) => {
                let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
                let started = connect(&fd, &SocketAddrUnix::new(path)?);
                (fd, started)
            }
        };
        match started {
            Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(Stream::new(fd)),
            Err(error) => Err(error.into()),
        }
    }

    /// Outcome of `connect`, once the socket is writable.
    pub fn connected(&self) -> io::Result<()> {
        sockopt::socket_error(&self.fd)?.map_err(io::Error::from)
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Reads once, with room for at least `wanted` bytes.
    pub fn fill(&mut self, wanted: usize) -> io::Result<Filled> {
        if let Some(tls) = &mut self.tls {
            return tls.fill(&self.fd, &mut self.input);
        }
        self.input.reserve(wanted.max(READ_BYTES / 2));
        let room = self.input.chunk_mut();
        let capacity = room.len();
        // SAFETY: `read` only writes to the slice, and never leaves written bytes uninitialised.
        let room = unsafe { room.as_uninit_slice_mut() };
        let read = match self.takes_descriptors {
            true => receive(&self.fd, room, &mut self.descriptor),
            false => rustix::io::read(&self.fd, room).map(|(read, _)| read.len()),
        };
        let read = match read {
            Ok(read) => read,
            Err(rustix::io::Errno::AGAIN) => return Ok(Filled::Drained),
            Err(rustix::io::Errno::INTR) => return Ok(Filled::More),
            Err(error) => return Err(error.into()),
        };
        if read == 0 {
            return Ok(Filled::Closed);
        }
        // SAFETY: the kernel has written `read` bytes at the front of the spare room.
        unsafe { self.input.advance_mut(read) };
        Ok(if read < capacity { Filled::Drained } else { Filled::More })
    }

    /// The descriptor that came with what was read, once; no other comes after it.
    pub fn take_descriptor(&mut self) -> Option<OwnedFd> {
        self.takes_descriptors &= self.descriptor.is_none();
        self.descriptor.take()
    }

    /// Sends a few bytes with a descriptor, at once. Not possible while others wait to be written.
    pub fn send_with(&mut self, bytes: &[u8], descriptor: BorrowedFd<'_>) -> io::Result<()> {
        if !self.output.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = [descriptor];
        control.push(SendAncillaryMessage::ScmRights(&descriptors));
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let sent = sendmsg(&self.fd, &[IoSlice::new(bytes)], &mut control, flags)?;
        // The rest, if the socket took only a part, follows as usual.
        self.output.bytes(&bytes[sent..]);
        Ok(())
    }

    /// What waits to be written; `flush` writes it.
    pub fn output(&mut self) -> &mut Outgoing {
        &mut self.output
    }

    /// The same, to look at.
    pub fn output_ref(&self) -> &Outgoing {
        &self.output
    }

    /// Bytes that wait to be written.
    pub fn pending_bytes(&self) -> usize {
        self.output.len() + usize::from(self.has_encrypted())
    }

    fn has_encrypted(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.wants_write())
    }

    /// Writes what the socket takes.
    pub fn flush(&mut self) -> io::Result<()> {
        if let Some(tls) = &mut self.tls {
            return tls.flush(&self.fd, &mut self.output);
        }
        while !self.output.is_empty() {
            let mut slices = [IoSlice::new(&[]); WRITE_SLICES];
            let count = self.output.gather(&mut slices);
            let sent = sendmsg(
                &self.fd,
                &slices[..count],
                &mut SendAncillaryBuffer::default(),
                SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
            );
            match sent {
                Ok(sent) => self.output.advance(sent),
                Err(rustix::io::Errno::AGAIN) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// The interest to register if it differs from what was last asked for: (readable, writable).
    /// `paused`: nothing is to be read for now.
    pub fn interest_change(&mut self, paused: bool) -> Option<(bool, bool)> {
        let wanted = (!paused, !self.output.is_empty() || self.has_encrypted());
        if wanted == (self.reading, self.writing) {
            return None;
        }
        (self.reading, self.writing) = wanted;
        Some(wanted)
    }

    /// States what was registered at first: readable, and writable if `writing`.
    pub fn registered(&mut self, writing: bool) {
        (self.reading, self.writing) = (true, writing);
    }
}

/// Reads, and keeps the last descriptor that came along; others are closed.
fn receive(
    fd: &OwnedFd,
    room: &mut [MaybeUninit<u8>],
    kept: &mut Option<OwnedFd>,
) -> rustix::io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    // SAFETY: `recvmsg` only writes to the slice, and its length is what was written.
    let room = unsafe { &mut *(room as *mut [MaybeUninit<u8>] as *mut [u8]) };
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(fd, &mut [IoSliceMut::new(room)], &mut control, flags)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            *kept = descriptors.last().or(kept.take());
        }
    }
    Ok(received.bytes)
}

/// Listens on a TCP address.
pub fn listen_tcp(address: SocketAddr) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))?;
    sockopt::set_socket_reuseaddr(&fd, true)?;
    rustix::net::bind(&fd, &address)?;
    rustix::net::listen(&fd, 128)?;
    Ok(fd)
}

/// Listens on a unix socket, taking the place of a file that nobody listens on any more.
pub fn listen_unix(path: &Path) -> io::Result<OwnedFd> {
    if path.exists() {
        let alive = std::os::unix::net::UnixStream::connect(path).is_ok();
        if alive {
            return Err(io::Error::from(io::ErrorKind::AddrInUse));
        }
        std::fs::remove_file(path)?;
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::bind(&fd, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&fd, 128)?;
    Ok(fd)
}
