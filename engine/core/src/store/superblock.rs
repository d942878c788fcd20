//! The store's identity and start counter, and small files that are replaced as a whole.
//!
//! Invariant: the start counter on disk is at least that of every record in the log; it is raised,
//! durably, before a new instance writes anything else.

use std::io::IoSlice;

use bytes::BytesMut;

use crate::checksum::crc32c;

use super::disk::{Disk, DiskResult, Errno};
use super::encoding::{Reader, push_u32, push_u64, put_text};
use super::errors::StoreError;

const MAGIC: &[u8; 8] = b"HCISTORE";
/// Version of the whole disk format.
pub const FORMAT_VERSION: u32 = 5;
const PATH: &str = "superblock";

/// Content of the superblock file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Superblock {
    pub cluster: [u8; 16],
    pub node: String,
    /// Random id of this store, chosen at its creation.
    pub uuid: [u8; 16],
    /// Counts the starts; the current instance's number.
    pub instance: u64,
    pub segment_bytes: u32,
    /// The log exists; until then an interrupted creation starts over.
    pub ready: bool,
    /// A record that had been synced was lost, and nobody has dealt with it yet.
    pub damaged: bool,
}

impl Superblock {
    /// Seed of the log's checksums.
    pub fn seed(&self) -> u32 {
        crc32c(&self.uuid)
    }

    /// Reads it; `None` where there is no store yet.
    pub fn load(disk: &dyn Disk) -> Result<Option<Superblock>, StoreError> {
        let damaged = || StoreError::Corrupt { file: PATH.to_owned() };
        match read_file(disk, PATH, MAGIC)? {
            Content::Missing => Ok(None),
            Content::Damaged => Err(damaged()),
            Content::Whole(content) => {
                let mut reader = Reader::new(&content);
                let version = reader.u32().ok_or_else(damaged)?;
                if version != FORMAT_VERSION {
                    return Err(StoreError::Format { version });
                }
                Superblock::decode(&mut reader).map(Some).ok_or_else(damaged)
            }
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Option<Superblock> {
        Some(Superblock {
            cluster: reader.array()?,
            node: reader.text()?,
            uuid: reader.array()?,
            instance: reader.u64()?,
            segment_bytes: reader.u32()?,
            ready: reader.u8()? != 0,
            damaged: reader.u8()? != 0,
        })
    }

    /// Replaces the file, durably.
    pub fn save(&self, disk: &dyn Disk) -> DiskResult<()> {
        let mut content = Vec::new();
        push_u32(&mut content, FORMAT_VERSION);
        content.extend_from_slice(&self.cluster);
        put_text(&mut content, &self.node);
        content.extend_from_slice(&self.uuid);
        push_u64(&mut content, self.instance);
        push_u32(&mut content, self.segment_bytes);
        content.extend_from_slice(&[u8::from(self.ready), u8::from(self.damaged)]);
        replace_file(disk, "", PATH, MAGIC, &content)
    }
}

/// What was found where a small file should be.
pub enum Content {
    Missing,
    Damaged,
    Whole(Vec<u8>),
}

/// Longest small file.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Writes `folder/name` aside, syncs it and renames it into place: magic, length, CRC32C, content.
pub fn replace_file(
    disk: &dyn Disk,
    folder: &str,
    name: &str,
    magic: &[u8; 8],
    content: &[u8],
) -> DiskResult<()> {
    let path = if folder.is_empty() { name.to_owned() } else { format!("{folder}/{name}") };
    let aside = format!("{path}.new");
    let mut bytes = Vec::with_capacity(content.len() + 16);
    bytes.extend_from_slice(magic);
    push_u32(&mut bytes, content.len() as u32);
    push_u32(&mut bytes, crc32c(content));
    bytes.extend_from_slice(content);
    let file = disk.create(&aside)?;
    file.set_len(0)?;
    file.write_at(0, &mut [IoSlice::new(&bytes)])?;
    file.sync_data()?;
    disk.rename(&aside, &path)?;
    disk.sync_dir(folder)
}

/// Reads a file that `replace_file` wrote.
pub fn read_file(disk: &dyn Disk, path: &str, magic: &[u8; 8]) -> DiskResult<Content> {
    let file = match disk.open(path) {
        Err(Errno::NOENT) => return Ok(Content::Missing),
        other => other?,
    };
    let length = file.length()?.min(FILE_BYTES_MAX) as usize;
    let mut bytes = BytesMut::new();
    file.read_at(0, length, &mut bytes)?;
    Ok(parse_file(&bytes, magic).map_or(Content::Damaged, Content::Whole))
}

fn parse_file(bytes: &[u8], magic: &[u8; 8]) -> Option<Vec<u8>> {
    let mut reader = Reader::new(bytes);
    if reader.array::<8>()? != *magic {
        return None;
    }
    let (length, checksum) = (reader.u32()? as usize, reader.u32()?);
    let content = reader.take(length)?;
    (crc32c(content) == checksum).then(|| content.to_vec())
}
