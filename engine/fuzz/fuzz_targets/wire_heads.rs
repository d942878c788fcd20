//! A kind and any bytes as its head.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../core/tests/fuzzed/wire_heads.rs"]
mod wire_heads;

fuzz_target!(|bytes: &[u8]| wire_heads::hold(bytes));
