//! Instances of linear attention: a state instead of a cache.

use super::{DTYPES, Instance, Value};

/// Adds them to the table.
pub fn add(table: &mut Vec<Instance>) {
    use Value::{Dtype, Int};
    for (dtype, _) in DTYPES {
        table.push(Instance {
            template: "wkv",
            variant: dtype.to_string(),
            version: "7.0",
            target: "sm_80",
            values: vec![("DTYPE", Dtype(dtype)), ("THREADS", Int(128))],
        });
    }
    for (dtype, _) in DTYPES {
        table.push(Instance {
            template: "retention",
            variant: dtype.to_string(),
            version: "7.0",
            target: "sm_80",
            values: vec![("DTYPE", Dtype(dtype)), ("THREADS", Int(32))],
        });
    }
}
