//! Who touched each byte last: the shadow of shared memory, and that of the global memory that a cluster uses.
//!
//! This is the algorithm of FastTrack (Flanagan and Freund 2009) with sets of readers kept exactly, because a tile is usually
//! read by several warps.

use std::collections::HashMap;

use crate::clock::{Clock, Tag};

/// Why an access is not in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Clash {
    /// Nothing wrote the byte.
    Uninit,
    /// An earlier write is not ordered before this access.
    Write(Tag),
    /// An earlier read is not ordered before this write.
    Read(Tag),
    /// The write is ordered but no proxy fence makes it visible to the asynchronous proxy.
    Unfenced(Tag),
}

/// Sets of readers, interned.
#[derive(Default, Debug)]
struct Readers {
    sets: Vec<Vec<Tag>>,
    index: HashMap<Vec<Tag>, u32>,
    /// The last question and its answer: neighbouring bytes ask the same.
    memo: (u32, u32, u32),
}

impl Readers {
    fn join(&mut self, old: u32, me: Tag, clock: &Clock) -> u32 {
        if old == 0 || old == me.0 {
            return me.0;
        }
        if self.memo.0 == old && self.memo.1 == me.0 {
            return self.memo.2;
        }
        let old_tag = Tag(old);
        // Readers ordered before this one need not be remembered: who is ordered after me is ordered after them.
        let mut set: Vec<Tag> =
            if old_tag.flag() { self.sets[(old & !Tag::FLAG) as usize].clone() } else { vec![old_tag] };
        set.retain(|t| !clock.covers(*t));
        let new = if set.is_empty() {
            me.0
        } else {
            set.push(me);
            set.sort_unstable();
            let next = self.sets.len() as u32;
            let index = *self.index.entry(set.clone()).or_insert(next);
            if index == next {
                self.sets.push(set);
            }
            Tag::FLAG | index
        };
        self.memo = (old, me.0, new);
        new
    }

    /// A reader that `clock` does not cover.
    fn unordered(&self, readers: u32, clock: &Clock) -> Option<Tag> {
        let tag = Tag(readers);
        if tag.flag() {
            self.sets[(readers & !Tag::FLAG) as usize].iter().copied().find(|t| !clock.covers(*t))
        } else {
            (!clock.covers(tag)).then_some(tag)
        }
    }
}

/// What the asynchronous proxy, when it is the one that accesses, may rely on: its clock, and which components need it.
pub(crate) type Fenced<'a> = Option<(&'a Clock, &'a dyn Fn(u32) -> bool)>;

/// The last writer and the readers since, per byte.
#[derive(Debug)]
struct Shadow {
    writer: Vec<u32>,
    readers: Vec<u32>,
}

impl Shadow {
    fn new(bytes: usize) -> Self {
        Shadow { writer: vec![0; bytes], readers: vec![0; bytes] }
    }

    /// Records a read of `n` bytes by `me` and checks it against `clock`; the first byte that is out of order. Bytes that
    /// nothing wrote are out of order where `initialised` says that something must have.
    #[inline]
    fn read(
        &mut self,
        sets: &mut Readers,
        range: std::ops::Range<usize>,
        me: Tag,
        clock: &Clock,
        (strong, initialised): (bool, bool),
        fenced: Fenced<'_>,
    ) -> Option<(usize, Clash)> {
        let at = range.start;
        let mut result = None;
        let mut last = 0;
        for (i, &w) in self.writer[range.clone()].iter().enumerate() {
            if w == last {
                continue;
            }
            last = w;
            let tag = Tag(w);
            let clash = if w == 0 {
                initialised.then_some(Clash::Uninit)
            } else if !(clock.covers(tag) || strong && tag.flag()) {
                Some(Clash::Write(tag))
            } else {
                fenced.and_then(|(fence, generic)| {
                    (generic(tag.component()) && !fence.covers(tag)).then_some(Clash::Unfenced(tag))
                })
            };
            if let Some(clash) = clash {
                result = result.or(Some((at + i, clash)));
            }
        }
        if initialised && self.writer[at] == 0 && result.is_none() {
            result = Some((at, Clash::Uninit));
        }
        if !strong {
            // Neighbouring bytes mostly have the same readers.
            let (mut old, mut new) = (me.0, me.0);
            for r in &mut self.readers[range] {
                if *r != old {
                    old = *r;
                    new = sets.join(old, me, clock);
                }
                *r = new;
            }
        }
        result
    }

    /// Records a write by `me` (tagged strong if it is) and checks it.
    #[inline]
    fn write(
        &mut self,
        sets: &Readers,
        range: std::ops::Range<usize>,
        me: Tag,
        clock: &Clock,
        fenced: Fenced<'_>,
    ) -> Option<(usize, Clash)> {
        let mut result = None;
        let (mut last_w, mut last_r) = (0, 0);
        for i in range.clone() {
            let (w, r) = (self.writer[i], self.readers[i]);
            if w != last_w {
                last_w = w;
                let tag = Tag(w);
                if !(clock.covers(tag) || me.flag() && tag.flag()) {
                    result = result.or(Some((i, Clash::Write(tag))));
                } else if let Some((fence, generic)) = fenced
                    && generic(tag.component())
                    && !fence.covers(tag)
                {
                    result = result.or(Some((i, Clash::Unfenced(tag))));
                }
            }
            if r != last_r {
                last_r = r;
                if let Some(tag) = sets.unordered(r, clock) {
                    result = result.or(Some((i, Clash::Read(tag))));
                }
            }
        }
        self.writer[range.clone()].fill(me.0);
        self.readers[range].fill(0);
        result
    }
}

/// Why an access is not in order among the lanes of its warp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LaneClash {
    /// A lane wrote the byte.
    Write(u8),
    /// A lane, or several, read the byte.
    Read(Option<u8>),
}

/// Which lane wrote a byte last, and which lanes of which warp read it last: lanes are threads, and the order of their warp's instructions
/// is not one among them.
#[derive(Debug)]
struct LaneShadow {
    writer: Vec<u8>,
    /// Tag of the warp that read, and the lane in the low byte; 0 for none.
    reader: Vec<u64>,
}

/// In place of a lane: none in particular, or more than one.
const MANY: u8 = 255;

/// Whether an access by the warp of `me` comes after its counter reached `seen`.
#[inline]
fn unordered(tag: Tag, me: Tag, seen: u32) -> bool {
    tag.component() == me.component() && tag.counter() >= seen
}

/// Shared memory of a block and its shadow.
#[derive(Debug)]
pub(crate) struct Shared {
    pub data: Vec<u8>,
    shadow: Shadow,
    lanes: LaneShadow,
    sets: Readers,
    /// Every byte with a tag lies in here.
    touched: std::ops::Range<usize>,
}

impl Shared {
    pub(crate) fn new(bytes: usize) -> Self {
        Shared {
            data: vec![0; bytes],
            shadow: Shadow::new(bytes),
            lanes: LaneShadow { writer: vec![MANY; bytes], reader: vec![0; bytes] },
            sets: Readers::default(),
            touched: 0..0,
        }
    }

    /// For the next block: nothing is initialised, the bytes are what the last block left.
    pub(crate) fn reset(&mut self) {
        let touched = std::mem::take(&mut self.touched);
        self.shadow.writer[touched.clone()].fill(0);
        self.lanes.reader[touched.clone()].fill(0);
        self.shadow.readers[touched].fill(0);
        self.sets = Readers::default();
    }

    #[inline]
    fn touch(&mut self, at: usize, n: usize) {
        if self.touched.is_empty() {
            self.touched = at..at + n;
        } else {
            self.touched.start = self.touched.start.min(at);
            self.touched.end = self.touched.end.max(at + n);
        }
    }

    /// Records a read of `n` bytes by `me` and checks it against `clock`. With `fenced`, the reader is the asynchronous proxy
    /// and writes for which `generic` holds must be covered by that clock too. Returns the first byte that is out of order.
    #[inline]
    pub(crate) fn read(
        &mut self,
        at: usize,
        n: usize,
        me: Tag,
        clock: &Clock,
        strong: bool,
        fenced: Fenced<'_>,
    ) -> Option<(usize, Clash)> {
        self.touch(at, n);
        self.shadow.read(&mut self.sets, at..at + n, me, clock, (strong, true), fenced)
    }

    /// Records a write by `me` (tagged strong if it is) and checks it.
    #[inline]
    pub(crate) fn write(
        &mut self,
        at: usize,
        n: usize,
        me: Tag,
        clock: &Clock,
        fenced: Fenced<'_>,
    ) -> Option<(usize, Clash)> {
        self.touch(at, n);
        self.shadow.write(&self.sets, at..at + n, me, clock, fenced)
    }

    /// Before [`Self::read`]: the same read as one of `lane`, which comes after what its warp did before its counter was `seen`.
    #[inline]
    pub(crate) fn read_by_lane(
        &mut self,
        at: usize,
        n: usize,
        me: Tag,
        lane: usize,
        seen: u32,
        strong: bool,
    ) -> Option<(usize, LaneClash)> {
        let lane = lane as u8;
        let (tags, writers) = (&self.shadow.writer[at..at + n], &self.lanes.writer[at..at + n]);
        let mut result = None;
        let mut last = (0, MANY);
        for (i, now) in tags.iter().copied().zip(writers.iter().copied()).enumerate() {
            if now != last {
                last = now;
                let (tag, writer) = (Tag(now.0), now.1);
                if unordered(tag, me, seen) && writer != lane && writer != MANY && !(strong && tag.flag()) {
                    result = result.or(Some((at + i, LaneClash::Write(writer))));
                }
            }
        }
        if !strong {
            let base = u64::from(me.0) << 8;
            let (one, many) = (base | u64::from(lane), base | u64::from(MANY));
            for reader in &mut self.lanes.reader[at..at + n] {
                // the first lane to read in this epoch, or one of several
                *reader = if *reader ^ base > 255 || *reader == one { one } else { many };
            }
        }
        result
    }

    /// Before [`Self::write`]: the same write as one of `lane`. One that changes nothing does not clash with another write.
    #[inline]
    pub(crate) fn write_by_lane(
        &mut self,
        at: usize,
        n: usize,
        me: Tag,
        lane: usize,
        seen: u32,
        changes: bool,
    ) -> Option<(usize, LaneClash)> {
        let lane = lane as u8;
        let (tags, writers) = (&self.shadow.writer[at..at + n], &self.lanes.writer[at..at + n]);
        let readers = &self.lanes.reader[at..at + n];
        let mut result = None;
        let mut last = (0, MANY, 0);
        for i in 0..n {
            let now = (tags[i], writers[i], readers[i]);
            if now == last {
                continue;
            }
            last = now;
            let (tag, writer, read, reader) = (Tag(now.0), now.1, Tag((now.2 >> 8) as u32), now.2 as u8);
            let clash = if changes
                && unordered(tag, me, seen)
                && writer != lane
                && writer != MANY
                && !(me.flag() && tag.flag())
            {
                LaneClash::Write(writer)
            } else if read.0 != 0 && unordered(read, me, seen) && reader != lane {
                LaneClash::Read((reader != MANY).then_some(reader))
            } else {
                continue;
            };
            result = result.or(Some((at + i, clash)));
        }
        self.lanes.writer[at..at + n].fill(lane);
        result
    }

    /// Changes the writer tag of bytes that `from` wrote: a transfer is complete, and readers must have seen `to`.
    pub(crate) fn retag(&mut self, at: usize, n: usize, from: Tag, to: Tag) {
        for w in &mut self.shadow.writer[at..at + n] {
            if *w == from.0 {
                *w = to.0;
            }
        }
        self.lanes.writer[at..at + n].fill(MANY);
    }

    /// Bytes nobody may read: `discard` and the end of an mbarrier.
    pub(crate) fn forget(&mut self, at: usize, n: usize) {
        self.shadow.writer[at..at + n].fill(0);
        self.shadow.readers[at..at + n].fill(0);
    }
}

const PAGE_BITS: u32 = 12;
/// 16 MiB of global memory, 128 MiB of shadow.
const MAX_PAGES: usize = 4096;
const RECENT: usize = 64;

/// The shadow of the global memory that the warps of one cluster have touched through the generic proxy. Other clusters have
/// other clocks: between blocks, the tags in `global.rs` tell who wrote.
#[derive(Debug)]
pub(crate) struct GlobalShadow {
    pages: Vec<Shadow>,
    index: HashMap<u64, u32>,
    /// Pages met lately, by the low bits of their number: (number, place in `pages`).
    recent: [(u64, u32); RECENT],
    sets: Readers,
}

impl Default for GlobalShadow {
    fn default() -> Self {
        GlobalShadow { pages: vec![], index: HashMap::new(), recent: [(u64::MAX, 0); RECENT], sets: Readers::default() }
    }
}

impl GlobalShadow {
    /// The page of `address`, the sets of readers, and the range of `n` bytes in the page: an access is aligned to its size.
    #[inline]
    fn find(&mut self, address: u64, n: usize) -> (&mut Shadow, &mut Readers, std::ops::Range<usize>) {
        let number = address >> PAGE_BITS;
        let recent = &mut self.recent[number as usize % RECENT];
        if recent.0 != number {
            if self.pages.len() >= MAX_PAGES && !self.index.contains_key(&number) {
                // What was done so far is forgotten: a race with it goes unseen.
                self.pages.clear();
                self.index.clear();
                self.recent = [(u64::MAX, 0); RECENT];
            }
            let place = *self.index.entry(number).or_insert_with(|| {
                self.pages.push(Shadow::new(1 << PAGE_BITS));
                self.pages.len() as u32 - 1
            });
            self.recent[number as usize % RECENT] = (number, place);
        }
        let place = self.recent[number as usize % RECENT].1;
        let at = (address & ((1 << PAGE_BITS) - 1)) as usize;
        (&mut self.pages[place as usize], &mut self.sets, at..at + n)
    }

    /// As [`Shared::read`]; whether the bytes are initialised is not asked.
    #[inline]
    pub(crate) fn read(&mut self, address: u64, n: usize, me: Tag, clock: &Clock, strong: bool) -> Option<Clash> {
        let (page, sets, range) = self.find(address, n);
        page.read(sets, range, me, clock, (strong, false), None).map(|(_, clash)| clash)
    }

    /// As [`Shared::write`].
    #[inline]
    pub(crate) fn write(&mut self, address: u64, n: usize, me: Tag, clock: &Clock) -> Option<Clash> {
        let (page, sets, range) = self.find(address, n);
        page.write(sets, range, me, clock, None).map(|(_, clash)| clash)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_are_all_remembered() {
        let mut shared = Shared::new(16);
        let clock = |own: u32| {
            let mut c = Clock::default();
            c.set(own, 1);
            c
        };
        let tag = |c| Tag::new(c, 1);
        let (mut a, b, c) = (clock(0), clock(1), clock(2));
        assert_eq!(shared.read(0, 4, tag(0), &a, false, None), Some((0, Clash::Uninit)));
        assert_eq!(shared.write(0, 8, tag(0), &a, None), None);
        assert_eq!(shared.read(0, 4, tag(1), &b, false, None), Some((0, Clash::Write(tag(0)))));
        assert_eq!(shared.read(0, 4, tag(2), &c, false, None), Some((0, Clash::Write(tag(0)))));
        // After a barrier with b alone, a's write still races with c's read.
        a.join(&b);
        assert_eq!(shared.write(0, 8, tag(0), &a, None), Some((0, Clash::Read(tag(2)))));
        a.join(&c);
        assert_eq!(shared.write(0, 8, tag(0), &a, None), None);
    }

    #[test]
    fn global_pages_come_and_go() {
        let mut shadow = GlobalShadow::default();
        let (mut a, mut b) = (Clock::default(), Clock::default());
        a.set(0, 1);
        b.set(1, 1);
        let (far, near) = (5 << 44, 2 << 44);
        assert_eq!(shadow.read(far, 4, Tag::new(0, 1), &a, false), None);
        assert_eq!(shadow.write(near, 4, Tag::new(1, 1), &b), None);
        assert_eq!(shadow.read(near, 4, Tag::new(0, 1), &a, false), Some(Clash::Write(Tag::new(1, 1))));
        assert_eq!(shadow.write(far, 1, Tag::new(1, 1), &b), Some(Clash::Read(Tag::new(0, 1))));
        for i in 1..=MAX_PAGES as u64 {
            assert_eq!(shadow.write(far + (i << PAGE_BITS), 16, Tag::new(1, 1), &b), None);
        }
        assert!(shadow.pages.len() <= MAX_PAGES);
        assert_eq!(shadow.read(near, 4, Tag::new(0, 1), &a, false), None);
    }

    #[test]
    fn strong_accesses_do_not_race_with_one_another() {
        let mut shared = Shared::new(4);
        let (mut a, mut b) = (Clock::default(), Clock::default());
        a.set(0, 1);
        b.set(1, 1);
        assert_eq!(shared.write(0, 4, Tag::new(0, 1).strong(), &a, None), None);
        assert_eq!(shared.write(0, 4, Tag::new(1, 1).strong(), &b, None), None);
        assert_eq!(shared.read(0, 4, Tag::new(0, 1), &a, true, None), None);
        assert!(shared.read(0, 4, Tag::new(0, 1), &a, false, None).is_some());
    }
}
