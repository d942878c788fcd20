//! The data of handshake options, parsed. Nothing here keeps state.

use super::constants::{MAX_STRING_BYTES, context, info};
use bytes::{Buf, Bytes};

/// The option's data does not have the form that its section prescribes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Malformed {
    Invalid(&'static str),
    TooBig(&'static str),
}

/// Which information a client of INFO or GO asked for; NBD_INFO_EXPORT is always sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Wanted {
    pub name: bool,
    pub description: bool,
    pub block_size: bool,
}

/// Reads an export name that fills the rest of `data`. Section «Option types», EXPORT_NAME.
pub(super) fn export_name(data: Bytes) -> Result<String, Malformed> {
    text(data)
}

/// Reads the data of INFO and GO: a name and information types. Unknown types are left out.
pub(super) fn info_request(mut data: Bytes) -> Result<(String, Wanted), Malformed> {
    let name = counted_text(&mut data)?;
    let count = data
        .try_get_u16()
        .map_err(|_| Malformed::Invalid("the count of information is missing"))?;
    if data.len() != usize::from(count) * 2 {
        return Err(Malformed::Invalid(
            "the count of information does not match the option's length",
        ));
    }
    let mut wanted = Wanted::default();
    while let Ok(kind) = data.try_get_u16() {
        match kind {
            info::NAME => wanted.name = true,
            info::DESCRIPTION => wanted.description = true,
            info::BLOCK_SIZE => wanted.block_size = true,
            _ => {}
        }
    }
    Ok((name, wanted))
}

/// What the queries of LIST_META_CONTEXT or SET_META_CONTEXT ask of the contexts that exist here.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct MetaQueries {
    pub export: String,
    pub count: u32,
    /// A query names `base:allocation`.
    pub allocation: bool,
    /// A query names `qemu:allocation-depth`.
    pub depth: bool,
    /// What queries name behind `qemu:dirty-bitmap:`, each once.
    pub dirty: Vec<String>,
    /// A query is the wildcard `base:`, `qemu:` or `qemu:dirty-bitmap:`.
    pub base: bool,
    pub qemu: bool,
    pub bitmaps: bool,
}

impl MetaQueries {
    /// Whether it takes the export's snapshots to answer. In a list no query asks for all there is.
    pub fn needs_snapshots(&self, set: bool) -> bool {
        !self.dirty.is_empty() || !set && (self.count == 0 || self.qemu || self.bitmaps)
    }
}

/// Reads the data of LIST_META_CONTEXT and SET_META_CONTEXT: an export's name and queries.
pub(super) fn meta_queries(mut data: Bytes) -> Result<MetaQueries, Malformed> {
    let export = counted_text(&mut data)?;
    let count =
        data.try_get_u32().map_err(|_| Malformed::Invalid("the count of queries is missing"))?;
    let mut queries = MetaQueries { export, count, ..MetaQueries::default() };
    for _ in 0..count {
        match counted_text(&mut data)?.as_str() {
            context::BASE_ALLOCATION => queries.allocation = true,
            context::ALLOCATION_DEPTH => queries.depth = true,
            context::BASE => queries.base = true,
            context::QEMU => queries.qemu = true,
            context::DIRTY_BITMAP => queries.bitmaps = true,
            other => {
                let bitmap = other.strip_prefix(context::DIRTY_BITMAP);
                if let Some(name) = bitmap.filter(|name| !queries.dirty.iter().any(|d| d == name)) {
                    queries.dirty.push(name.to_owned());
                }
            }
        }
    }
    if data.has_remaining() {
        return Err(Malformed::Invalid("there are bytes after the last query"));
    }
    Ok(queries)
}

/// A string after its 32-bit length.
fn counted_text(data: &mut Bytes) -> Result<String, Malformed> {
    let length =
        data.try_get_u32().map_err(|_| Malformed::Invalid("a string's length is missing"))?;
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if length > data.len() {
        return Err(Malformed::Invalid("a string is longer than the option"));
    }
    text(data.split_to(length))
}

/// Strings are UTF-8 without NUL and at most 4096 bytes long.
fn text(bytes: Bytes) -> Result<String, Malformed> {
    if bytes.len() > MAX_STRING_BYTES {
        return Err(Malformed::TooBig("a string is longer than 4096 bytes"));
    }
    match std::str::from_utf8(&bytes) {
        Ok(text) if !text.contains('\0') => Ok(text.to_owned()),
        Ok(_) => Err(Malformed::Invalid("a string contains a NUL")),
        Err(_) => Err(Malformed::Invalid("a string is not UTF-8")),
    }
}
