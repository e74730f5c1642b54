//! Special registers (PTX ISA 10).

use crate::op::Special;

/// The special register called `name`, the clocks excepted.
pub(crate) fn parse(name: &str) -> Option<Special> {
    let axis = |tail: &str| match tail {
        ".x" => Some(0),
        ".y" => Some(1),
        ".z" => Some(2),
        _ => None,
    };
    for (prefix, make) in [
        ("%tid", Special::Tid as fn(usize) -> Special),
        ("%ntid", Special::Ntid),
        ("%ctaid", Special::Ctaid),
        ("%nctaid", Special::Nctaid),
        ("%cluster_ctaid", Special::ClusterCtaid),
        ("%cluster_nctaid", Special::ClusterNctaid),
        ("%clusterid", Special::ClusterId),
        ("%nclusterid", Special::NClusterId),
    ] {
        if let Some(i) = name.strip_prefix(prefix).and_then(axis) {
            return Some(make(i));
        }
    }
    Some(match name {
        "%laneid" => Special::LaneId,
        "%warpid" => Special::WarpId,
        "%nwarpid" => Special::NWarpId,
        "%lanemask_eq" => Special::LaneMaskEq,
        "%lanemask_lt" => Special::LaneMaskLt,
        "%lanemask_le" => Special::LaneMaskLe,
        "%lanemask_gt" => Special::LaneMaskGt,
        "%lanemask_ge" => Special::LaneMaskGe,
        "%smid" => Special::SmId,
        "%nsmid" => Special::NSmId,
        "%gridid" => Special::GridId,
        "%dynamic_smem_size" => Special::DynamicSmemSize,
        "%total_smem_size" => Special::TotalSmemSize,
        "%cluster_ctarank" => Special::ClusterCtaRank,
        "%cluster_nctarank" => Special::ClusterNctaRank,
        _ => return None,
    })
}

pub(crate) fn bits(special: Special) -> u32 {
    if special == Special::GridId { 64 } else { 32 }
}

/// Whether it came with clusters.
pub(crate) fn of_clusters(special: Special) -> bool {
    matches!(
        special,
        Special::ClusterCtaid(_)
            | Special::ClusterNctaid(_)
            | Special::ClusterId(_)
            | Special::NClusterId(_)
            | Special::ClusterCtaRank
            | Special::ClusterNctaRank
    )
}
