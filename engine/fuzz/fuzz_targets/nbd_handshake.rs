//! Any bytes as a client's handshake.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../core/tests/fuzzed/nbd_handshake.rs"]
mod nbd_handshake;

fuzz_target!(|bytes: &[u8]| nbd_handshake::hold(bytes));
