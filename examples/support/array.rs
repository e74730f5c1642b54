//! Host arrays: a vector and a shape.

use gatefold::{Element, View, ViewMut};

/// A contiguous array in host memory.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Array<T> {
    pub data: Vec<T>,
    pub shape: Vec<usize>,
}

impl<T: Element> Array<T> {
    pub fn zeros(shape: &[usize]) -> Self {
        Array { data: vec![T::default(); shape.iter().product()], shape: shape.to_vec() }
    }
}

impl<T: Copy> Array<T> {
    pub fn new(data: Vec<T>, shape: &[usize]) -> Self {
        assert_eq!(data.len(), shape.iter().product::<usize>(), "{shape:?}");
        Array { data, shape: shape.to_vec() }
    }

    /// The same numbers in another shape.
    pub fn reshape(mut self, shape: &[usize]) -> Self {
        assert_eq!(self.data.len(), shape.iter().product::<usize>(), "{shape:?}");
        self.shape = shape.to_vec();
        self
    }

    /// As `[rows, all the rest]`.
    pub fn flat(self, rows: usize) -> Self {
        let width = self.data.len() / rows.max(1);
        self.reshape(&[rows, width])
    }

    /// As `[rows, last]`: all dimensions but the last are rows.
    pub fn rows(&self) -> View<'_, T, 2> {
        let width = *self.shape.last().unwrap_or(&1);
        View::new(&self.data, [self.shape[..self.shape.len().max(1) - 1].iter().product(), width])
    }

    pub fn rows_mut(&mut self) -> ViewMut<'_, T, 2> {
        let width = *self.shape.last().unwrap_or(&1);
        let rows = self.shape[..self.shape.len().max(1) - 1].iter().product();
        ViewMut::new(&mut self.data, [rows, width])
    }

    /// The shape with `N` dimensions: further leading ones are joined, missing ones are 1. Whether it fits is for the function to
    /// say that takes the view.
    fn dims<const N: usize>(&self) -> [usize; N] {
        let mut dims = [1usize; N];
        for (i, n) in self.shape.iter().rev().enumerate() {
            let dim = &mut dims[N - 1 - i.min(N - 1)];
            *dim = dim.saturating_mul(*n);
        }
        dims
    }

    /// With `N` dimensions.
    pub fn view<const N: usize>(&self) -> View<'_, T, N> {
        View::new(&self.data, self.dims())
    }

    pub fn view_mut<const N: usize>(&mut self) -> ViewMut<'_, T, N> {
        let dims = self.dims();
        ViewMut::new(&mut self.data, dims)
    }

    /// Columns `start ..` of every row, as `[rows, heads, width]` with `heads` parts of `stride` columns.
    pub fn columns(&self, start: usize, heads: usize, stride: usize, width: usize) -> View<'_, T, 3> {
        let rows = self.rows();
        let [n, row] = rows.shape();
        View::with_strides(&self.data[start.min(self.data.len())..], [n, heads, width], [row, stride, 1])
    }

    pub fn columns_mut(&mut self, start: usize, heads: usize, stride: usize, width: usize) -> ViewMut<'_, T, 3> {
        let [n, row] = self.rows().shape();
        let start = start.min(self.data.len());
        ViewMut::with_strides(&mut self.data[start..], [n, heads, width], [row, stride, 1])
    }

    /// Some of the rows.
    pub fn pick(&self, rows: &[usize]) -> Self {
        let all = self.rows();
        let width = all.shape()[1];
        let data = rows.iter().flat_map(|r| all.row(&[*r]).iter().copied()).collect();
        Array { data, shape: vec![rows.len(), width] }
    }
}

impl<T: Element> Array<T> {
    /// Each number rounded to another type.
    pub fn cast<U: Element>(&self) -> Array<U> {
        Array { data: cast(&self.data), shape: self.shape.clone() }
    }

    pub fn to_f64(&self) -> Vec<f64> {
        self.data.iter().map(|x| x.to_f64()).collect()
    }
}

/// Each number rounded to another type.
pub fn cast<T: Element, U: Element>(data: &[T]) -> Vec<U> {
    data.iter().map(|x| U::from_f64(x.to_f64())).collect()
}

/// `[a, b, c, d]` to `[a, c, b, d]`.
pub fn swap_middle<T: Copy>(array: &Array<T>) -> Array<T> {
    let [a, b, c, d]: [usize; 4] = array.shape.as_slice().try_into().expect("four dimensions");
    let mut data = Vec::with_capacity(array.data.len());
    for i in 0..a {
        for k in 0..c {
            for j in 0..b {
                let start = ((i * b + j) * c + k) * d;
                data.extend_from_slice(&array.data[start..start + d]);
            }
        }
    }
    Array { data, shape: vec![a, c, b, d] }
}
