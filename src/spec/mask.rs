//! Which key a query may see, by position.

use super::positive;
use crate::error::Result;
use std::ops::Range;

/// Which key a query may see, by position alone. All that is set must hold; nothing set: every key.
///
/// Query `i` of a sequence stands at the absolute position `qi = q_start + i`, key `j` at `kj = k_start + j`. Unless
/// the call says otherwise `k_start = 0` and `q_start = kv_len - q_len`: the last query sees the last key (aligned
/// bottom right). Positions may be negative (`kv_len < q_len`).
///
/// ```
/// let mask = gatefold::spec::Mask { causal: true, window_left: Some(2), ..Default::default() };
/// assert!(mask.visible(5, 3) && !mask.visible(5, 2) && !mask.visible(5, 6));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default, deny_unknown_fields))]
pub struct Mask {
    /// `kj <= qi`.
    pub causal: bool,
    /// `kj >= qi - window_left`: that many keys before the query. A Hugging Face `sliding_window` of `w` is `w - 1`.
    pub window_left: Option<usize>,
    /// `kj <= qi + window_right`: that many keys behind the query.
    pub window_right: Option<usize>,
    /// `floor(kj / chunk) = floor(qi / chunk)`: query and key lie in the same chunk of absolute positions.
    pub chunk: Option<usize>,
}

impl Mask {
    /// `kj <= qi` and nothing else.
    pub const fn causal() -> Self {
        Mask { causal: true, window_left: None, window_right: None, chunk: None }
    }

    /// # Errors
    /// [`crate::Error::Value`] for a chunk of 0.
    pub fn validate(&self) -> Result<()> {
        self.chunk.map_or(Ok(()), |chunk| positive("mask.chunk", chunk))
    }

    /// Whether the query at position `qi` may see the key at position `kj`.
    pub fn visible(&self, qi: i64, kj: i64) -> bool {
        (!self.causal || kj <= qi)
            && self.window_left.is_none_or(|w| kj >= qi.saturating_sub(to_i64(w)))
            && self.window_right.is_none_or(|w| kj <= qi.saturating_add(to_i64(w)))
            && self.chunk.is_none_or(|c| kj.div_euclid(to_i64(c)) == qi.div_euclid(to_i64(c)))
    }

    /// The positions that the query at `qi` may see: they are always one range (`end` excluded; empty if `start >= end`).
    pub fn visible_range(&self, qi: i64) -> Range<i64> {
        let (mut start, mut end) = (i64::MIN, i64::MAX);
        if self.causal {
            end = qi.saturating_add(1);
        }
        if let Some(w) = self.window_left {
            start = qi.saturating_sub(to_i64(w));
        }
        if let Some(w) = self.window_right {
            end = end.min(qi.saturating_add(to_i64(w)).saturating_add(1));
        }
        if let Some(c) = self.chunk {
            let first = qi.div_euclid(to_i64(c)).saturating_mul(to_i64(c));
            start = start.max(first);
            end = end.min(first.saturating_add(to_i64(c)));
        }
        start..end
    }
}

/// Lengths beyond `i64` mean "no limit".
fn to_i64(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn range_is_what_is_visible() {
        let options = [None, Some(0), Some(1), Some(3), Some(usize::MAX)];
        for causal in [false, true] {
            for window_left in options {
                for window_right in options {
                    for chunk in [None, Some(1), Some(4), Some(usize::MAX)] {
                        let mask = Mask { causal, window_left, window_right, chunk };
                        for qi in -6..7 {
                            let range = mask.visible_range(qi);
                            for kj in -15..15 {
                                assert_eq!(mask.visible(qi, kj), range.contains(&kj), "{mask:?} {qi} {kj}");
                            }
                        }
                    }
                }
            }
        }
    }
}
