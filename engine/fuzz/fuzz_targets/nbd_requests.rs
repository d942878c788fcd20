//! Any bytes as a client's requests.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../core/tests/fuzzed/nbd_requests.rs"]
mod nbd_requests;

fuzz_target!(|bytes: &[u8]| nbd_requests::hold(bytes));
