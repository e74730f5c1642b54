//! Arrays with strides over larger buffers. What lies around inputs is poison (NaN, or the largest integer), what lies around outputs are
//! guard values that are compared afterwards.

use bytemuck::Pod;
use gatefold::{View, ViewMut};

/// How an array lies in its buffer; the last dimension is always contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Layout {
    /// Row-major without gaps.
    #[default]
    Contiguous,
    /// Row-major with odd gaps behind every dimension, so that rows are not aligned either.
    Padded,
    /// The leading dimensions in reverse order, with gaps: heads before tokens.
    Permuted,
    /// Row-major with gaps that keep rows at multiples of 16 bytes where their width is one.
    Aligned,
}

impl Layout {
    pub const ALL: [Layout; 3] = [Layout::Contiguous, Layout::Padded, Layout::Permuted];

    fn strides<const N: usize>(self, shape: [usize; N]) -> [usize; N] {
        let mut order: Vec<usize> = (0..N - 1).rev().collect();
        if self == Layout::Permuted {
            order.reverse();
        }
        let gap = match self {
            Layout::Contiguous => [0, 0],
            Layout::Aligned => [8, 24],
            _ => [3, 5],
        };
        let mut strides = [1; N];
        let mut step = shape[N - 1] + gap[0];
        for i in order {
            strides[i] = step;
            step = step * shape[i].max(1) + gap[1];
        }
        strides
    }
}

/// Values in front of and behind every array.
const MARGIN: usize = 37;

/// What surrounds an input.
fn poison<T: Pod>() -> T {
    let mut value = T::zeroed();
    bytemuck::bytes_of_mut(&mut value).fill(0xff); // NaN in every floating-point format, -1 or the largest as an integer
    value
}

/// What surrounds an output.
fn guard<T: Pod>() -> T {
    let mut value = T::zeroed();
    bytemuck::bytes_of_mut(&mut value).fill(0xa5);
    value
}

fn indices<const N: usize>(shape: [usize; N]) -> impl Iterator<Item = [usize; N]> {
    (0..shape.iter().product::<usize>()).map(move |flat| {
        let mut rest = flat;
        let mut index = [0; N];
        for i in (0..N).rev() {
            index[i] = rest % shape[i];
            rest /= shape[i];
        }
        index
    })
}

/// A buffer with an array in it.
#[derive(Clone, Debug)]
struct Buffer<T, const N: usize> {
    data: Vec<T>,
    shape: [usize; N],
    strides: [usize; N],
}

impl<T: Pod, const N: usize> Buffer<T, N> {
    fn new(shape: [usize; N], layout: Layout, fill: T) -> Self {
        let strides = layout.strides(shape);
        let extent: usize = shape.iter().zip(strides).map(|(n, s)| n.saturating_sub(1) * s).sum::<usize>() + 1;
        Buffer { data: vec![fill; extent + 2 * MARGIN], shape, strides }
    }

    fn offset(&self, index: [usize; N]) -> usize {
        MARGIN + index.iter().zip(self.strides).map(|(i, s)| i * s).sum::<usize>()
    }

    fn values(&self) -> Vec<T> {
        indices(self.shape).map(|index| self.data[self.offset(index)]).collect()
    }
}

/// An input.
#[derive(Clone, Debug)]
pub struct Array<T, const N: usize>(Buffer<T, N>);

impl<T: Pod, const N: usize> Array<T, N> {
    /// From row-major values.
    pub fn new(shape: [usize; N], layout: Layout, values: &[T]) -> Self {
        assert_eq!(values.len(), shape.iter().product::<usize>());
        let mut buffer = Buffer::new(shape, layout, poison());
        for (index, value) in indices(shape).zip(values) {
            let at = buffer.offset(index);
            buffer.data[at] = *value;
        }
        Array(buffer)
    }

    pub fn shape(&self) -> [usize; N] {
        self.0.shape
    }

    pub fn view(&self) -> View<'_, T, N> {
        View::with_strides(&self.0.data[MARGIN..self.0.data.len() - MARGIN], self.0.shape, self.0.strides)
    }

    pub fn at(&self, index: [usize; N]) -> T {
        self.0.data[self.0.offset(index)]
    }

    pub fn set(&mut self, index: [usize; N], value: T) {
        let at = self.0.offset(index);
        self.0.data[at] = value;
    }

    /// The values, row-major.
    pub fn values(&self) -> Vec<T> {
        self.0.values()
    }

    /// The same values in another layout.
    pub fn with_layout(&self, layout: Layout) -> Self {
        Array::new(self.0.shape, layout, &self.values())
    }
}

/// An output between guard values.
#[derive(Clone, Debug)]
pub struct Output<T, const N: usize>(Buffer<T, N>);

impl<T: Pod, const N: usize> Output<T, N> {
    pub fn new(shape: [usize; N], layout: Layout) -> Self {
        Output(Buffer::new(shape, layout, guard()))
    }

    pub fn view(&mut self) -> ViewMut<'_, T, N> {
        let end = self.0.data.len() - MARGIN;
        ViewMut::with_strides(&mut self.0.data[MARGIN..end], self.0.shape, self.0.strides)
    }

    /// The values, row-major, after a look at the guard values.
    pub fn finish(&self, name: &str) -> Vec<T> {
        let mut rest = self.0.data.clone();
        for index in indices(self.0.shape) {
            rest[self.0.offset(index)] = guard();
        }
        assert_guards(name, &rest);
        self.0.values()
    }

    /// Fails if anything was written.
    pub fn assert_untouched(&self, name: &str) {
        assert_guards(name, &self.0.data);
    }
}

fn assert_guards<T: Pod>(name: &str, data: &[T]) {
    let guard = guard::<T>();
    for (at, value) in data.iter().enumerate() {
        let same = bytemuck::bytes_of(value) == bytemuck::bytes_of(&guard);
        assert!(same, "`{name}`: written at element {at} of the buffer, {MARGIN} before the array's start");
    }
}

/// A flat output between guard values.
#[derive(Clone, Debug)]
pub struct Flat<T>(Output<T, 1>);

impl<T: Pod> Flat<T> {
    pub fn new(len: usize) -> Self {
        Flat(Output::new([len], Layout::Contiguous))
    }

    pub fn slice(&mut self) -> &mut [T] {
        let len = self.0.0.shape[0];
        &mut self.0.0.data[MARGIN..MARGIN + len]
    }

    pub fn finish(&self, name: &str) -> Vec<T> {
        self.0.finish(name)
    }

    pub fn assert_untouched(&self, name: &str) {
        self.0.assert_untouched(name);
    }
}
