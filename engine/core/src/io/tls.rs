//! TLS on an accepted connection: rustls does the protocol, without I/O; this moves its bytes.
//!
//! The configuration is shared by the connections that began with it, so that certificates can be
//! replaced while these go on. What a client calls itself is handed on as its certificate, unread:
//! policy judges it. TLS 1.2 and 1.3; pre-shared keys are not in rustls.

use super::{Filled, Outgoing};
use bytes::{Bytes, BytesMut};
use rustix::fd::{AsFd, BorrowedFd};
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};
use std::fmt;
use std::io::{self, IoSlice, Write};
use std::sync::Arc;

/// Read from the socket in one go: four records.
const CIPHERTEXT_BYTES: usize = 64 << 10;
/// Encrypted ahead of what the socket takes.
const AHEAD_BYTES: usize = 256 << 10;
const SLICES: usize = 64;

/// How a server shows who it is, and whom it believes.
#[derive(Clone)]
pub struct TlsConfig(Arc<ServerConfig>);

/// A certificate or key that cannot be used; the text says which, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadCredentials(pub String);

impl fmt::Display for BadCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadCredentials {}

fn certificates(pem: &[u8], what: &str) -> Result<Vec<CertificateDer<'static>>, BadCredentials> {
    let bad = |why: &dyn fmt::Display| BadCredentials(format!("{what}: {why}"));
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let found = found.map_err(|error| bad(&error))?;
    if found.is_empty() { Err(bad(&"there is no certificate in it")) } else { Ok(found) }
}

impl TlsConfig {
    /// From PEM: the server's certificate, with those between it and the one that clients know, its key,
    /// and the authorities whose certificates clients must have. None: clients need none.
    pub fn new(
        certificate: &[u8],
        key: &[u8],
        client_authorities: Option<&[u8]>,
    ) -> Result<TlsConfig, BadCredentials> {
        let bad = |what: &'static str| {
            move |error: &dyn fmt::Display| BadCredentials(format!("{what}: {error}"))
        };
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| bad("TLS")(&error))?;
        let builder = match client_authorities {
            None => builder.with_no_client_auth(),
            Some(pem) => {
                let mut roots = RootCertStore::empty();
                for authority in certificates(pem, "client_ca")? {
                    roots.add(authority).map_err(|error| bad("client_ca")(&error))?;
                }
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                        .build()
                        .map_err(|error| bad("client_ca")(&error))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let chain = certificates(certificate, "certificate")?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| bad("key")(&error))?;
        let config = builder.with_single_cert(chain, key).map_err(|error| bad("key")(&error))?;
        Ok(TlsConfig(Arc::new(config)))
    }
}

/// The TLS session of one connection.
pub(super) struct Tls {
    connection: ServerConnection,
    received: Box<[u8]>,
}

impl Tls {
    pub fn new(config: &TlsConfig) -> io::Result<Tls> {
        let mut connection = ServerConnection::new(config.0.clone()).map_err(io::Error::other)?;
        connection.set_buffer_limit(Some(AHEAD_BYTES));
        Ok(Tls { connection, received: vec![0; CIPHERTEXT_BYTES].into() })
    }

    /// Whether the client has yet to show who it is.
    pub fn is_handshaking(&self) -> bool {
        self.connection.is_handshaking()
    }

    /// The client's own certificate, in DER, which one of the authorities has signed.
    pub fn peer_certificate(&self) -> Option<Bytes> {
        let chain = self.connection.peer_certificates()?;
        chain.first().map(|certificate| Bytes::copy_from_slice(certificate))
    }

    /// Whether something is encrypted and not sent.
    pub fn wants_write(&self) -> bool {
        self.connection.wants_write()
    }

    /// Reads once from the socket, and puts what it says behind `input`.
    pub fn fill(&mut self, fd: impl AsFd, input: &mut BytesMut) -> io::Result<Filled> {
        let read = match rustix::io::read(&fd, &mut *self.received) {
            Ok(read) => read,
            Err(rustix::io::Errno::AGAIN) => return Ok(Filled::Drained),
            Err(rustix::io::Errno::INTR) => return Ok(Filled::More),
            Err(error) => return Err(error.into()),
        };
        if read == 0 {
            return Ok(Filled::Closed);
        }
        let mut left = &self.received[..read];
        while !left.is_empty() {
            if self.connection.read_tls(&mut left)? == 0 {
                // The client has said that nothing more comes.
                break;
            }
            let state = match self.connection.process_new_packets() {
                Ok(state) => state,
                Err(error) => {
                    // The client is told why, as far as the socket takes it.
                    let _ = self.connection.write_tls(&mut Socket(fd.as_fd()));
                    return Err(io::Error::new(io::ErrorKind::InvalidData, error));
                }
            };
            let plain = state.plaintext_bytes_to_read();
            if plain > 0 {
                let end = input.len();
                input.resize(end + plain, 0);
                io::Read::read_exact(&mut self.connection.reader(), &mut input[end..])?;
            }
        }
        Ok(if read < self.received.len() { Filled::Drained } else { Filled::More })
    }

    /// Tells the peer that the session ends here, as far as the socket takes it.
    pub fn close(&mut self, fd: impl AsFd) {
        self.connection.send_close_notify();
        let _ = self.connection.write_tls(&mut Socket(fd.as_fd()));
    }

    /// Encrypts what waits, and writes what the socket takes.
    pub fn flush(&mut self, fd: impl AsFd, output: &mut Outgoing) -> io::Result<()> {
        loop {
            while !output.is_empty() && !self.connection.is_handshaking() {
                let mut slices = [IoSlice::new(&[]); SLICES];
                let count = output.gather(&mut slices);
                let taken = self.connection.writer().write_vectored(&slices[..count])?;
                if taken == 0 {
                    break;
                }
                output.advance(taken);
            }
            if !self.connection.wants_write() {
                return Ok(());
            }
            match self.connection.write_tls(&mut Socket(fd.as_fd())) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Sends without a signal where the peer is gone.
struct Socket<'a>(BorrowedFd<'a>);

impl Write for Socket<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let slices = &slices[..slices.len().min(SLICES)];
        Ok(sendmsg(self.0, slices, &mut SendAncillaryBuffer::default(), flags)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_that_cannot_be_used_say_which_and_why() {
        let told = |certificate: &[u8], key: &[u8], authorities: Option<&[u8]>| {
            TlsConfig::new(certificate, key, authorities).err().map(|bad| bad.0).unwrap_or_default()
        };
        assert!(told(b"", b"", None).starts_with("certificate: there is no certificate"));
        assert!(told(b"", b"", Some(b"x")).starts_with("client_ca: there is no certificate"));
        let not_one = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        assert!(told(not_one, b"", None).starts_with("key: "));
        assert!(told(not_one, b"", Some(not_one)).starts_with("client_ca: "));
    }
}
