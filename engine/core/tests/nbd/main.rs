//! Behaviour of the NBD modules beyond their bytes, which `nbd_golden` fixes.

mod client;
mod handshake;
mod properties;
mod replies;
mod requests;
