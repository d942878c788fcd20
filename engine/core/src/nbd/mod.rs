//! NBD: handshake, requests and replies without I/O; `serve` does the I/O.
