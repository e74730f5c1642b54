//! Kernels of a Mixture-of-Experts transformer.

pub mod args;
pub mod cpu;
pub mod cuda;
pub mod element;
pub mod error;
pub mod random;
pub mod reference;
pub mod spec;
pub mod view;

pub use element::{Dtype, Element};
pub use error::{Error, Result};
pub use view::{View, ViewMut};
