//! Happens-before: vector clocks.
//!
//! Every party that can touch memory on its own is a component of the clocks: a warp, the `cp.async` copies of a warp, its
//! `wgmma`s, its bulk copies, and the transfers that signal one mbarrier. A component has a counter; an access is tagged with
//! (component, counter) and is ordered before a warp if the warp's clock has reached that counter. Barriers, waits, and
//! release-acquire pairs join clocks. What remembers the accesses to each byte is in `shadow.rs`.

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
    pub(crate) const FLAG: u32 = 1 << 31;
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
    pub(crate) fn flag(self) -> bool {
        self.0 & Self::FLAG != 0
    }
}
