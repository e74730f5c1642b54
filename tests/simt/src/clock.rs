//! Happens-before: vector clocks, and the shadow of shared memory that remembers who touched each byte last.
//!
//! Every party that can touch memory on its own is a component of the clocks: a warp, the `cp.async` copies of a warp, its
//! `wgmma`s, its bulk copies, and the transfers that signal one mbarrier. A component has a counter; an access is tagged with
//! (component, counter) and is ordered before a warp if the warp's clock has reached that counter. Barriers, waits, and
//! release-acquire pairs join clocks. This is the algorithm of FastTrack (Flanagan and Freund 2009) with sets of readers kept
//! exactly, because a tile is usually read by several warps.

use std::collections::HashMap;

/// What each component is known to have done.
#[derive(Clone, Debug, Default)]
pub(crate) struct Clock(Vec<u32>);

impl Clock {
    #[inline]
    pub(crate) fn get(&self, component: u32) -> u32 {
        self.0.get(component as usize).copied().unwrap_or(0)
    }

    pub(crate) fn set(&mut self, component: u32, value: u32) {
        let i = component as usize;
        if self.0.len() <= i {
            self.0.resize(i + 1, 0);
        }
        self.0[i] = value;
    }

    /// Raises one component.
    pub(crate) fn raise(&mut self, component: u32, value: u32) {
        if self.get(component) < value {
            self.set(component, value);
        }
    }

    pub(crate) fn join(&mut self, other: &Clock) {
        if self.0.len() < other.0.len() {
            self.0.resize(other.0.len(), 0);
        }
        for (mine, theirs) in self.0.iter_mut().zip(&other.0) {
            *mine = (*mine).max(*theirs);
        }
    }

    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    #[inline]
    pub(crate) fn covers(&self, tag: Tag) -> bool {
        tag.counter() <= self.get(tag.component())
    }
}

/// (component, counter) of an access, in one word: a flag, 11 bits, 20 bits. Zero means no access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Tag(pub u32);

impl Tag {
    /// In writer tags: an atomic or otherwise strong access. In reader tags: the rest is an index of a set.
    const FLAG: u32 = 1 << 31;
    pub(crate) const MAX_COMPONENTS: usize = 1 << 11;
    /// A counter that no clock reaches: not yet complete.
    pub(crate) const NEVER: u32 = (1 << 20) - 1;

    pub(crate) fn new(component: u32, counter: u32) -> Tag {
        debug_assert!((component as usize) < Self::MAX_COMPONENTS);
        assert!(counter <= Self::NEVER, "a kernel with more than 2^20 synchronisations of one warp");
        Tag(component << 20 | counter)
    }

    pub(crate) fn strong(self) -> Tag {
        Tag(self.0 | Self::FLAG)
    }

    #[inline]
    pub(crate) fn component(self) -> u32 {
        (self.0 & !Self::FLAG) >> 20
    }

    #[inline]
    pub(crate) fn counter(self) -> u32 {
        self.0 & Self::NEVER
    }

    #[inline]
    fn flag(self) -> bool {
        self.0 & Self::FLAG != 0
    }
}

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

/// Shared memory of a block with the last writer and the readers since, per byte.
#[derive(Debug)]
pub(crate) struct Shared {
    pub data: Vec<u8>,
    writer: Vec<u32>,
    readers: Vec<u32>,
    sets: Readers,
    /// Every byte with a tag lies in here.
    touched: std::ops::Range<usize>,
}

impl Shared {
    pub(crate) fn new(bytes: usize) -> Self {
        Shared {
            data: vec![0; bytes],
            writer: vec![0; bytes],
            readers: vec![0; bytes],
            sets: Readers::default(),
            touched: 0..0,
        }
    }

    /// For the next block: nothing is initialised, the bytes are what the last block left.
    pub(crate) fn reset(&mut self) {
        let touched = std::mem::take(&mut self.touched);
        self.writer[touched.clone()].fill(0);
        self.readers[touched].fill(0);
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
        fenced: Option<(&Clock, &dyn Fn(u32) -> bool)>,
    ) -> Option<(usize, Clash)> {
        self.touch(at, n);
        let mut result = None;
        let mut last = 0;
        for (i, &w) in self.writer[at..at + n].iter().enumerate() {
            if w == last {
                continue;
            }
            last = w;
            let tag = Tag(w);
            let clash = if w == 0 {
                Some(Clash::Uninit)
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
        if self.writer[at] == 0 && result.is_none() {
            result = Some((at, Clash::Uninit));
        }
        if !strong {
            // Neighbouring bytes mostly have the same readers.
            let (mut old, mut new) = (me.0, me.0);
            for r in &mut self.readers[at..at + n] {
                if *r != old {
                    old = *r;
                    new = self.sets.join(old, me, clock);
                }
                *r = new;
            }
        }
        result
    }

    /// Records a write by `me` (tagged strong if it is) and checks it.
    #[inline]
    pub(crate) fn write(
        &mut self,
        at: usize,
        n: usize,
        me: Tag,
        clock: &Clock,
        fenced: Option<(&Clock, &dyn Fn(u32) -> bool)>,
    ) -> Option<(usize, Clash)> {
        self.touch(at, n);
        let mut result = None;
        let (mut last_w, mut last_r) = (0, 0);
        for i in at..at + n {
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
                if let Some(tag) = self.sets.unordered(r, clock) {
                    result = result.or(Some((i, Clash::Read(tag))));
                }
            }
        }
        self.writer[at..at + n].fill(me.0);
        self.readers[at..at + n].fill(0);
        result
    }

    /// Changes the writer tag of bytes that `from` wrote: a transfer is complete, and readers must have seen `to`.
    pub(crate) fn retag(&mut self, at: usize, n: usize, from: Tag, to: Tag) {
        for w in &mut self.writer[at..at + n] {
            if *w == from.0 {
                *w = to.0;
            }
        }
    }

    /// Bytes nobody may read: `discard` and the end of an mbarrier.
    pub(crate) fn forget(&mut self, at: usize, n: usize) {
        self.writer[at..at + n].fill(0);
        self.readers[at..at + n].fill(0);
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
