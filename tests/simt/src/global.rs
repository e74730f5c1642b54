//! Global memory: buffers far apart in a 64-bit space, pages on demand, a tag per byte.

use std::collections::VecDeque;

use crate::window::{BUFFER_BITS, MODULE_VARS};

const PAGE_BITS: u32 = 16;
const PAGE: u64 = 1 << PAGE_BITS;
/// Addresses have 64 bits, of which 44 count within a buffer.
const MAX_BUFFERS: usize = 1 << 18;

/// Tags of a byte: who wrote it.
const UNINIT: u32 = 0;
const HOST: u32 = 1;
/// Block `b` writes `b + FIRST_BLOCK`.
const FIRST_BLOCK: u32 = 2;
const STRONG: u32 = 1 << 31;

/// Why an access to global memory is at fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GlobalFault {
    OutOfBounds,
    /// Offset of the byte in the access.
    Uninit(u32),
    /// Written by another block of this launch.
    Foreign(u32),
    /// Written by this launch at all.
    Written,
}

#[derive(Debug)]
struct Page {
    data: Box<[u8]>,
    tags: Box<[u32]>,
    dirty: bool,
}

#[derive(Debug, Default)]
struct Buffer {
    len: u64,
    /// Page number + 1 in `pages`; 0 where no page is yet.
    table: Vec<u32>,
    pages: Vec<Page>,
    read_only: bool,
    live: bool,
}

/// All buffers. Buffer `i` begins at `i << 44`; numbers 0 and 1 are not for users.
#[derive(Debug, Default)]
pub(crate) struct Global {
    buffers: Vec<Buffer>,
    /// Numbers of freed buffers, oldest first; used again only when numbers run out.
    freed: VecDeque<u32>,
    dirty: Vec<(u32, u32)>,
}

impl Buffer {
    fn new(len: u64) -> Self {
        Buffer { len, table: vec![0; len.div_ceil(PAGE) as usize], pages: vec![], read_only: false, live: true }
    }

    fn page(&self, offset: u64) -> Option<&Page> {
        match self.table[(offset >> PAGE_BITS) as usize] {
            0 => None,
            n => Some(&self.pages[n as usize - 1]),
        }
    }

    fn page_mut(&mut self, offset: u64) -> (&mut Page, u32) {
        let slot = (offset >> PAGE_BITS) as usize;
        if self.table[slot] == 0 {
            let size = (self.len - (slot as u64) * PAGE).min(PAGE) as usize;
            let page = Page { data: vec![0; size].into(), tags: vec![UNINIT; size].into(), dirty: false };
            self.pages.push(page);
            self.table[slot] = self.pages.len() as u32;
        }
        let n = self.table[slot];
        (&mut self.pages[n as usize - 1], n - 1)
    }
}

impl Global {
    /// A new buffer, uninitialised. Its address.
    pub(crate) fn alloc(&mut self, len: u64) -> u64 {
        assert!(len <= 1 << (BUFFER_BITS - 1), "a buffer of {len} bytes");
        while self.buffers.len() < 2 {
            self.buffers.push(Buffer::default());
        }
        if self.buffers.len() >= MAX_BUFFERS {
            let number = self.freed.pop_front().expect("fewer than 2^18 buffers at a time");
            self.buffers[number as usize] = Buffer::new(len);
            return u64::from(number) << BUFFER_BITS;
        }
        self.buffers.push(Buffer::new(len));
        ((self.buffers.len() - 1) as u64) << BUFFER_BITS
    }

    /// Frees a buffer: later accesses are out of bounds.
    pub(crate) fn free(&mut self, address: u64) -> bool {
        let known = address.trailing_zeros() >= BUFFER_BITS
            && self.buffers.get((address >> BUFFER_BITS) as usize).is_some_and(|b| b.live);
        if known {
            self.buffers[(address >> BUFFER_BITS) as usize] = Buffer::default();
            self.freed.push_back((address >> BUFFER_BITS) as u32);
        }
        known
    }

    /// The buffer of module variables, anew.
    pub(crate) fn reset_module(&mut self, bytes: u64) {
        while self.buffers.len() < 2 {
            self.buffers.push(Buffer::default());
        }
        self.buffers[(MODULE_VARS >> BUFFER_BITS) as usize] = Buffer::new(bytes);
    }

    /// Bytes from `address` to the end of its buffer.
    pub(crate) fn len(&self, address: u64) -> Option<u64> {
        let buffer = self.buffers.get((address >> BUFFER_BITS) as usize)?;
        buffer.len.checked_sub(address & ((1 << BUFFER_BITS) - 1))
    }

    #[inline]
    fn find(&self, address: u64, n: u64) -> Option<(&Buffer, u64)> {
        let buffer = self.buffers.get((address >> BUFFER_BITS) as usize)?;
        let offset = address & ((1 << BUFFER_BITS) - 1);
        (offset + n <= buffer.len && buffer.len > 0).then_some((buffer, offset))
    }

    /// Writes from the host: the bytes count as initialised.
    pub(crate) fn host_write(&mut self, address: u64, bytes: &[u8]) -> bool {
        if bytes.is_empty() {
            return self.len(address).is_some();
        }
        if self.find(address, bytes.len() as u64).is_none() {
            return false;
        }
        let buffer = &mut self.buffers[(address >> BUFFER_BITS) as usize];
        let mut offset = address & ((1 << BUFFER_BITS) - 1);
        let mut rest = bytes;
        while !rest.is_empty() {
            let (page, _) = buffer.page_mut(offset);
            let at = (offset % PAGE) as usize;
            let n = rest.len().min(page.data.len() - at);
            page.data[at..at + n].copy_from_slice(&rest[..n]);
            page.tags[at..at + n].fill(HOST);
            rest = &rest[n..];
            offset += n as u64;
        }
        true
    }

    /// Reads to the host; the number of bytes that nothing wrote (they read as 0), or `None` if out of bounds.
    pub(crate) fn host_read(&self, address: u64, out: &mut [u8]) -> Option<u64> {
        if out.is_empty() {
            return self.len(address).map(|_| 0);
        }
        let (buffer, mut offset) = self.find(address, out.len() as u64)?;
        let mut uninit = 0;
        let mut rest = out;
        while !rest.is_empty() {
            let at = (offset % PAGE) as usize;
            let n = rest.len().min(PAGE as usize - at);
            let (head, tail) = rest.split_at_mut(n);
            match buffer.page(offset) {
                Some(page) => {
                    head.copy_from_slice(&page.data[at..at + n]);
                    uninit += page.tags[at..at + n].iter().filter(|t| **t == UNINIT).count() as u64;
                }
                None => {
                    head.fill(0);
                    uninit += n as u64;
                }
            }
            rest = tail;
            offset += n as u64;
        }
        Some(uninit)
    }

    /// Reads up to 16 aligned bytes for block `block`. `known` says whether the writes of another block are ordered before.
    #[inline]
    pub(crate) fn read(
        &self,
        address: u64,
        out: &mut [u8],
        block: u32,
        strong: bool,
        read_only: bool,
        known: impl Fn(u32) -> bool + Copy,
    ) -> Result<(), GlobalFault> {
        let n = out.len();
        let (buffer, offset) = self.find(address, n as u64).ok_or(GlobalFault::OutOfBounds)?;
        let room = (PAGE - offset % PAGE) as usize;
        if n > room {
            let (head, tail) = out.split_at_mut(room);
            self.read(address, head, block, strong, read_only, known)?;
            return self.read(address + room as u64, tail, block, strong, read_only, known);
        }
        let Some(page) = buffer.page(offset) else {
            out.fill(0);
            return Err(GlobalFault::Uninit(0));
        };
        let at = (offset % PAGE) as usize;
        out.copy_from_slice(&page.data[at..at + n]);
        let mut last = HOST;
        for (i, &tag) in page.tags[at..at + n].iter().enumerate() {
            if tag == last {
                continue;
            }
            last = tag;
            if tag == UNINIT {
                return Err(GlobalFault::Uninit(i as u32));
            }
            let writer = (tag & !STRONG).wrapping_sub(FIRST_BLOCK);
            if tag != HOST {
                if read_only && !buffer.read_only {
                    return Err(GlobalFault::Written);
                }
                if writer != block && !(strong && tag & STRONG != 0) && !known(writer) {
                    return Err(GlobalFault::Foreign(writer));
                }
            }
        }
        Ok(())
    }

    /// Writes up to 16 aligned bytes for block `block`.
    #[inline]
    pub(crate) fn write(
        &mut self,
        address: u64,
        bytes: &[u8],
        block: u32,
        strong: bool,
        known: impl Fn(u32) -> bool + Copy,
    ) -> Result<(), GlobalFault> {
        let n = bytes.len();
        if self.find(address, n as u64).is_none() {
            return Err(GlobalFault::OutOfBounds);
        }
        let room = (PAGE - address % PAGE) as usize;
        if n > room {
            self.write(address, &bytes[..room], block, strong, known)?;
            return self.write(address + room as u64, &bytes[room..], block, strong, known);
        }
        let number = (address >> BUFFER_BITS) as usize;
        let buffer = &mut self.buffers[number];
        if buffer.read_only {
            return Err(GlobalFault::OutOfBounds);
        }
        let offset = address & ((1 << BUFFER_BITS) - 1);
        let (page, page_number) = buffer.page_mut(offset);
        if !page.dirty {
            page.dirty = true;
            self.dirty.push((number as u32, page_number));
        }
        let at = (offset % PAGE) as usize;
        page.data[at..at + n].copy_from_slice(bytes);
        let me = block + FIRST_BLOCK;
        let mine = if strong { me | STRONG } else { me };
        let mut fault = Ok(());
        for tag in &mut page.tags[at..at + n] {
            let writer = *tag & !STRONG;
            if *tag > HOST && writer != me && !(strong && *tag & STRONG != 0) && !known(writer - FIRST_BLOCK) {
                fault = Err(GlobalFault::Foreign(writer - FIRST_BLOCK));
            }
            *tag = mine;
        }
        fault
    }

    /// The bytes become uninitialised (`discard`).
    pub(crate) fn forget(&mut self, address: u64, n: u64) -> Result<(), GlobalFault> {
        if self.find(address, n).is_none() {
            return Err(GlobalFault::OutOfBounds);
        }
        let buffer = &mut self.buffers[(address >> BUFFER_BITS) as usize];
        let offset = address & ((1 << BUFFER_BITS) - 1);
        let (page, _) = buffer.page_mut(offset);
        let at = (offset % PAGE) as usize;
        page.tags[at..at + n as usize].fill(UNINIT);
        Ok(())
    }

    /// The end of a launch: what it wrote is ordinary data for the next.
    pub(crate) fn settle(&mut self) {
        for (buffer, page) in self.dirty.drain(..) {
            let Some(page) = self.buffers[buffer as usize].pages.get_mut(page as usize) else { continue };
            page.dirty = false;
            for tag in page.tags.iter_mut() {
                *tag = (*tag).min(HOST);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sparse_and_strict() {
        let mut g = Global::default();
        let a = g.alloc(5 << 40);
        let far = a + (4 << 40) + 12;
        let read = |g: &Global, at| {
            let mut out = [0; 4];
            g.read(at, &mut out, 0, false, false, |_| false).map(|()| out)
        };
        assert_eq!(read(&g, far), Err(GlobalFault::Uninit(0)));
        assert!(g.host_write(far, &[1, 2, 3, 4]));
        assert_eq!(read(&g, far), Ok([1, 2, 3, 4]));
        assert_eq!(read(&g, far + 4), Err(GlobalFault::Uninit(0)));
        assert_eq!(read(&g, a + (5 << 40) - 2), Err(GlobalFault::OutOfBounds));
        assert_eq!(read(&g, a - 4), Err(GlobalFault::OutOfBounds));
        assert_eq!(g.write(far, &[9; 4], 3, false, |_| false), Ok(()));
        assert_eq!(g.write(far, &[8; 4], 4, false, |_| false), Err(GlobalFault::Foreign(3)));
        assert_eq!(read(&g, far), Err(GlobalFault::Foreign(4)));
        g.settle();
        assert_eq!(read(&g, far), Ok([8; 4]));
    }
}
