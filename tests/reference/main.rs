//! The reference on closed forms: cases whose answer is known without computing it the same way.

#[path = "../common/mod.rs"]
mod common;

mod attention;
mod experts;
mod glue;
mod linear_attention;
mod route;
