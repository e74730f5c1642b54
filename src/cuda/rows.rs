//! Rows of a matrix in device memory: the checks that need addresses, made before a launch.

use crate::cuda::driver::Driver;
use crate::cuda::kernels::Kernel;
use crate::element::Dtype;
use crate::error::{Error, Result};

/// Longest row that a kernel takes: column indices and their byte offsets stay far from the end of 32 bits.
pub(super) const MAX_WIDTH: usize = 1 << 30;

/// Most rows: the x extent of a grid.
pub(super) const MAX_ROWS: usize = i32::MAX as usize;

/// Alignment that lets a kernel move 16 bytes at once.
const VECTOR_BYTES: u64 = 16;

/// A matrix in device memory whose rows are contiguous.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows {
    pub name: &'static str,
    pub ptr: u64,
    pub num_rows: usize,
    pub row_bytes: u64,
    pub stride_bytes: u64,
}

/// The sizes of a plan are such that a kernel can index them.
pub(super) fn check_sizes(rows: (&str, usize), width: (&str, usize)) -> Result<()> {
    if rows.1 > MAX_ROWS {
        return Err(Error::value(rows.0, format!("at most {MAX_ROWS}"), rows.1));
    }
    if width.1 == 0 || width.1 > MAX_WIDTH {
        return Err(Error::value(width.0, format!("1 to {MAX_WIDTH}"), width.1));
    }
    Ok(())
}

/// Stride in bytes, if the last row still has an address; 0 where no row is stepped over, whatever the stride says.
pub(super) fn stride_bytes(name: &str, dtype: Dtype, num_rows: usize, stride: usize) -> Result<u64> {
    if num_rows <= 1 {
        return Ok(0);
    }
    let bytes = (stride as u64).checked_mul(dtype.size_bytes() as u64);
    match bytes.filter(|bytes| bytes.checked_mul(num_rows as u64).is_some_and(|end| end <= i64::MAX as u64)) {
        Some(bytes) => Ok(bytes),
        None => {
            let expected = "rows within 2^63 bytes".into();
            Err(Error::Stride { argument: name.into(), expected, found: vec![stride, 1] })
        }
    }
}

/// Rows of an output must not overlap.
pub(super) fn check_output_stride(name: &str, num_rows: usize, width: usize, stride: usize) -> Result<()> {
    if num_rows > 1 && stride < width {
        let expected = format!("rows that do not overlap (at least {width} apart)");
        return Err(Error::Stride { argument: name.into(), expected, found: vec![stride, 1] });
    }
    Ok(())
}

/// Whether widths and strides let every row begin at a multiple of 16 bytes, if the first does.
pub(super) fn strides_aligned(row_bytes: u64, strides: &[u64]) -> bool {
    row_bytes.is_multiple_of(VECTOR_BYTES) && strides.iter().all(|stride| stride.is_multiple_of(VECTOR_BYTES))
}

/// A kernel that moves 16 bytes at once, and its twin that takes any rows: the same bits.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Twins {
    /// `None` where widths and strides rule it out.
    aligned: Option<&'static Kernel>,
    unaligned: &'static Kernel,
}

impl Twins {
    /// Both, or only the second if rows cannot all begin at multiples of 16 bytes.
    pub(super) fn new(can_align: bool, aligned: &'static Kernel, unaligned: &'static Kernel) -> Self {
        Twins { aligned: can_align.then_some(aligned), unaligned }
    }

    /// Name of the kernel that runs when all pointers are multiples of 16.
    pub(super) fn name(&self) -> &'static str {
        self.aligned.unwrap_or(self.unaligned).entry
    }

    /// Loads both.
    pub(super) fn warmup(&self, driver: &dyn Driver) -> Result<()> {
        self.aligned.iter().chain([&self.unaligned]).try_for_each(|kernel| driver.load(kernel))
    }

    /// The one for these pointers.
    pub(super) fn pick(&self, pointers_aligned: bool) -> &'static Kernel {
        self.aligned.filter(|_| pointers_aligned).unwrap_or(self.unaligned)
    }
}

impl Rows {
    /// A pointer that is not null, aligned to the element, with the last row within the address space.
    pub(super) fn check(&self, dtype: Dtype) -> Result<()> {
        self.check_size(dtype.size_bytes() as u64)
    }

    /// [`Rows::check`] for elements of so many bytes.
    pub(super) fn check_size(&self, size: u64) -> Result<()> {
        if self.ptr == 0 || !self.ptr.is_multiple_of(size) {
            let expected = format!("a device pointer that is a multiple of {size}");
            return Err(Error::value(self.name, expected, format_args!("{:#x}", self.ptr)));
        }
        if self.ptr.checked_add(self.extent_bytes()).is_none() {
            let expected = format!("{} bytes below the end of the address space", self.extent_bytes());
            return Err(Error::value(self.name, expected, format_args!("{:#x}", self.ptr)));
        }
        Ok(())
    }

    /// Whether the first row begins at a multiple of 16 bytes.
    pub(super) fn aligned(&self) -> bool {
        self.ptr.is_multiple_of(VECTOR_BYTES)
    }

    /// An output and another array must be the same rows or separate ones: a kernel reads a column before it writes it,
    /// but knows nothing of other columns.
    pub(super) fn check_same_or_separate(&self, other: &Rows) -> Result<()> {
        let same = self.ptr == other.ptr && (self.stride_bytes == other.stride_bytes || self.num_rows == 1);
        if same { Ok(()) } else { self.check_separate(other) }
    }

    /// An output and another array must not share memory.
    pub(super) fn check_separate(&self, other: &Rows) -> Result<()> {
        if self.overlaps(other) {
            return Err(Error::Overlap { argument: self.name.into(), other: other.name.into() });
        }
        Ok(())
    }

    /// From the first byte to one past the last.
    fn extent_bytes(&self) -> u64 {
        (self.num_rows.max(1) as u64 - 1) * self.stride_bytes + self.row_bytes
    }

    /// Exact where the strides are equal (columns of one wide matrix); otherwise whether the extents meet.
    fn overlaps(&self, other: &Rows) -> bool {
        let (low, high) = if self.ptr <= other.ptr { (self, other) } else { (other, self) };
        let distance = high.ptr - low.ptr;
        if distance >= low.extent_bytes() {
            return false;
        }
        let stride = low.stride_bytes;
        if stride != high.stride_bytes || stride < low.row_bytes || stride < high.row_bytes {
            return true;
        }
        // Both step alike: a row of `high` begins `into` bytes after a row of `low`, and ends before the next one or not.
        let into = distance % stride;
        into < low.row_bytes || stride - into < high.row_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(ptr: u64, num_rows: usize, row_bytes: u64, stride_bytes: u64) -> Rows {
        Rows { name: "x", ptr, num_rows, row_bytes, stride_bytes }
    }

    #[test]
    fn overlap() {
        let left = rows(0x1000, 4, 32, 64);
        assert!(!left.overlaps(&rows(0x1020, 4, 32, 64)), "the other half of the same rows");
        assert!(left.overlaps(&rows(0x1010, 4, 32, 64)), "begins inside a row");
        assert!(left.overlaps(&rows(0x1030, 4, 32, 64)), "runs into the next row");
        assert!(!left.overlaps(&rows(0x10E0, 4, 32, 64)), "after the last row");
        assert!(left.overlaps(&rows(0x1020, 4, 32, 32)), "other strides: extents decide");
        assert!(!left.overlaps(&rows(0x0F80, 4, 32, 32)), "ends where the other begins");
        assert!(left.overlaps(&rows(0x1000, 4, 32, 0)), "one row for all");
    }

    #[test]
    fn same_rows_are_in_place() {
        let x = rows(0x1000, 4, 32, 64);
        assert!(x.check_same_or_separate(&rows(0x1000, 4, 32, 64)).is_ok());
        assert!(x.check_same_or_separate(&rows(0x1000, 4, 32, 32)).is_err());
        assert!(x.check_separate(&rows(0x1000, 4, 32, 64)).is_err());
    }

    #[test]
    fn no_overflow() {
        assert!(stride_bytes("x", Dtype::F32, MAX_ROWS, usize::MAX).is_err());
        assert!(stride_bytes("x", Dtype::F32, 2, usize::MAX / 4).is_err());
        assert_eq!(stride_bytes("x", Dtype::F32, 1, usize::MAX).unwrap(), 0);
        assert!(rows(u64::MAX - 7, 1, 16, 0).check(Dtype::F32).is_err());
    }
}
