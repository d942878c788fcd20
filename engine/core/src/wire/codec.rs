//! Reading and writing the fields of heads. A read past the end gives `Short`, never a panic.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// The head ended early, or a field in it is out of range.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub struct Short;

/// Takes fields off the front of a head.
pub struct Fields(pub Bytes);

impl Fields {
    fn need(&self, bytes: usize) -> Result<(), Short> {
        if self.0.len() < bytes { Err(Short) } else { Ok(()) }
    }
    pub fn u8(&mut self) -> Result<u8, Short> {
        self.need(1)?;
        Ok(self.0.get_u8())
    }
    pub fn u16(&mut self) -> Result<u16, Short> {
        self.need(2)?;
        Ok(self.0.get_u16_le())
    }
    pub fn u32(&mut self) -> Result<u32, Short> {
        self.need(4)?;
        Ok(self.0.get_u32_le())
    }
    pub fn u64(&mut self) -> Result<u64, Short> {
        self.need(8)?;
        Ok(self.0.get_u64_le())
    }
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Short> {
        self.need(N)?;
        let mut value = [0; N];
        self.0.copy_to_slice(&mut value);
        Ok(value)
    }
    /// A length (u16) and that many bytes of UTF-8.
    pub fn text(&mut self) -> Result<String, Short> {
        let length = usize::from(self.u16()?);
        self.need(length)?;
        String::from_utf8(self.0.split_to(length).to_vec()).map_err(|_| Short)
    }
    /// A count (u32) and that many items, each of at least `item_bytes`.
    pub fn list<T>(
        &mut self,
        item_bytes: usize,
        mut item: impl FnMut(&mut Self) -> Result<T, Short>,
    ) -> Result<Vec<T>, Short> {
        let count = self.u32()? as usize;
        self.need(count.checked_mul(item_bytes).ok_or(Short)?)?;
        (0..count).map(|_| item(self)).collect()
    }
    /// Nothing may be left over.
    pub fn end(self) -> Result<(), Short> {
        if self.0.is_empty() { Ok(()) } else { Err(Short) }
    }
}

pub fn put_text(out: &mut BytesMut, text: &str) {
    let length = u16::try_from(text.len()).expect("names are limited to 1,024 bytes");
    out.put_u16_le(length);
    out.put_slice(text.as_bytes());
}

pub fn put_list<T>(out: &mut BytesMut, items: &[T], mut item: impl FnMut(&mut BytesMut, &T)) {
    out.put_u32_le(u32::try_from(items.len()).expect("lists are bounded by the head's limit"));
    items.iter().for_each(|value| item(out, value));
}
