//! Ids between Python's hex text and the engine's bytes.

use hci_engine_core::geometry::ImageId;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

pub fn parse_id(text: &str) -> PyResult<ImageId> {
    text.parse().map_err(|_| PyValueError::new_err(format!("'{text}' is not 32 hex digits")))
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
