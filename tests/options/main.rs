//! All features compose: every pair of values of two options of attention, routing and experts occurs in a generated table, and every
//! row of the table is computed by the reference and by a second, independent formula, and on every CPU level. Each test prints how
//! many of the possible pairs its table covers; pairs that no valid call has are checked to be refused.

#[path = "../common/mod.rs"]
mod common;

mod attention;
mod experts;
mod route;

use common::tables::Table;
