//! Any bytes as a stream of frames.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../core/tests/fuzzed/wire_frames.rs"]
mod wire_frames;

fuzz_target!(|bytes: &[u8]| wire_frames::hold(bytes));
