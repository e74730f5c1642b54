//! A radix sort of keys in segments, largest key first: a stable sort by digits, from the last to the first, of which
//! each pass is a sort of assignments by expert.

use crate::cuda::driver::{Driver, Launch, Stream};
use crate::cuda::group_tokens::{GroupTokens, GroupTokensArgs, GroupTokensPlan, division};
use crate::cuda::kernels::{Kernel, route_digits};
use crate::cuda::memory::Parts;
use crate::error::{Error, Result};
use crate::spec::{ExpertFfn, Ffn};

/// Bits of a digit: as many values as `group_tokens` takes experts.
const DIGIT_BITS: u32 = 11;

/// The passes, with what they need of the workspace.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Sort {
    count: usize,
    /// Keys are f32 and NaN comes last; else u32.
    is_float: bool,
    segment_passes: u32,
    len_magic: u32,
    len_shift: u32,
    pass: GroupTokensPlan,
    /// Two orders, the one before and the one after a pass.
    orders: [usize; 2],
    digits: usize,
    offsets: usize,
    permutation: usize,
    position: usize,
    tile_counts: usize,
    tiles: usize,
    workspace: usize,
}

impl Sort {
    /// `count` keys, contiguous, in segments of `len`, of which the last may be shorter. At least one.
    pub(super) fn new(count: usize, len: usize, is_float: bool, parts: &mut Parts) -> Result<Self> {
        if count > i32::MAX as usize {
            return Err(Error::unsupported("cuda", format!("a sort of {count} keys")));
        }
        let segments = count.div_ceil(len);
        let spec = ExpertFfn::new(1 << DIGIT_BITS, Ffn::default());
        let problem = GroupTokens::new(&spec, count, 1);
        let pass = GroupTokensPlan::new(&problem)?;
        let (len_magic, len_shift) = division(len as u32);
        let bits = usize::BITS - segments.saturating_sub(1).leading_zeros();
        Ok(Sort {
            count,
            is_float,
            segment_passes: bits.div_ceil(DIGIT_BITS),
            len_magic,
            len_shift,
            orders: [parts.part(count, 4), parts.part(count, 4)],
            digits: parts.part(count, 4),
            offsets: parts.part((1 << DIGIT_BITS) + 1, 4),
            permutation: parts.part(count, 4),
            position: parts.part(count, 4),
            tile_counts: parts.part(4, 4),
            tiles: parts.part(4 * problem.max_tiles(), 16),
            workspace: parts.part(pass.workspace_bytes(), 1),
            pass,
        })
    }

    pub(super) fn kernels(&self) -> Vec<&'static Kernel> {
        let mut kernels = vec![digits_kernel()];
        kernels.extend(self.pass.used());
        kernels
    }

    /// Queues it; gives the order: for each place of each segment, in turn, the number of its key among all.
    ///
    /// # Safety
    /// `keys` and the workspace at `base` are memory of the device, as large as `new` was told and has laid out.
    pub(super) unsafe fn launch(&self, driver: &dyn Driver, keys: u64, base: u64, stream: Stream) -> Result<u64> {
        let at = |offset: usize| base + offset as u64;
        // Whether the digit is the segment's, and its first bit.
        let key_passes = (0..32).step_by(DIGIT_BITS as usize).map(|shift| Some((0, shift)));
        let segment_passes = (0..self.segment_passes).map(|pass| Some((1, pass * DIGIT_BITS)));
        let mut before = 0;
        let mut permutation = 0;
        let mut after = at(self.orders[0]);
        // The last step only applies what the last pass did.
        for digit in key_passes.chain(segment_passes).chain([None]) {
            let (by_segment, shift) = digit.unwrap_or((0, 0));
            let params = route_digits::Params {
                keys_ptr: keys,
                before_ptr: before,
                permutation_ptr: permutation,
                after_ptr: after,
                digits_ptr: digit.map_or(0, |_| at(self.digits)),
                count: self.count as u32, // at most 2^31 - 1, seen by `new`
                shift,
                by_segment,
                is_float: u32::from(self.is_float),
                len_magic: self.len_magic,
                len_shift: self.len_shift,
            };
            let kernel = digits_kernel();
            let launch = Launch::grid([(self.count as u32).div_ceil(kernel.threads), 1, 1]);
            // SAFETY: the caller's promise, also below.
            unsafe { driver.launch(kernel, &launch, &params.to_bytes(), stream)? };
            if digit.is_none() {
                break;
            }
            permutation = at(self.permutation);
            let (offsets, tile_counts, tiles) = (at(self.offsets), at(self.tile_counts), at(self.tiles));
            let args =
                GroupTokensArgs::new(at(self.digits), offsets, permutation, at(self.position), tile_counts, tiles)
                    .with_workspace(at(self.workspace));
            // SAFETY: as above.
            unsafe { self.pass.launch(driver, &args, stream)? };
            before = after;
            after = if after == at(self.orders[0]) { at(self.orders[1]) } else { at(self.orders[0]) };
        }
        Ok(after)
    }
}

fn digits_kernel() -> &'static Kernel {
    &route_digits::INSTANCES[0].kernel
}
