//! Sizes of the caches, for the blocking. They change the speed alone, never a result.

use std::sync::OnceLock;

/// Bytes that one core has for itself.
#[derive(Clone, Copy, Debug)]
pub struct Caches {
    /// First level, data.
    pub l1: usize,
    /// Second level.
    pub l2: usize,
}

/// Where nothing can be found out: what nearly every core of the last ten years has at least.
const USUAL: Caches = Caches { l1: 32 << 10, l2: 512 << 10 };

/// The sizes of this machine, looked up once.
pub fn sizes() -> Caches {
    static SIZES: OnceLock<Caches> = OnceLock::new();
    *SIZES.get_or_init(|| {
        let found = detect();
        // A hypervisor may tell anything.
        Caches { l1: found.l1.clamp(16 << 10, 256 << 10), l2: found.l2.clamp(128 << 10, 4 << 20) }
    })
}

/// From CPUID: leaf 4 (Intel), leaf 0x8000001D (AMD), in the same format.
#[cfg(target_arch = "x86_64")]
#[allow(unused_unsafe)] // safe in newer compilers
fn detect() -> Caches {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    let mut found = USUAL;
    // SAFETY: every x86-64 CPU has CPUID; leaves above the highest are not asked for.
    unsafe {
        let vendor = __cpuid(0);
        let amd = vendor.ebx == u32::from_le_bytes(*b"Auth") || vendor.ebx == u32::from_le_bytes(*b"Hygo");
        let (base, leaf) = if amd { (0x8000_0000, 0x8000_001D) } else { (0, 4) };
        if __cpuid(base).eax < leaf {
            return found;
        }
        for index in 0..8 {
            let cache = __cpuid_count(leaf, index);
            let (kind, level) = (cache.eax & 31, cache.eax >> 5 & 7);
            let (ways, partitions, line) = (cache.ebx >> 22, cache.ebx >> 12 & 0x3ff, cache.ebx & 0xfff);
            let bytes =
                (ways + 1) as usize * (partitions + 1) as usize * (line + 1) as usize * (cache.ecx as usize + 1);
            match (kind, level) {
                (0, _) => break,
                (1 | 3, 1) => found.l1 = bytes,
                (1 | 3, 2) => found.l2 = bytes,
                _ => {}
            }
        }
    }
    found
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Caches {
    USUAL
}

#[cfg(test)]
mod tests {
    #[test]
    fn plausible() {
        let caches = super::sizes();
        println!("{caches:?}");
        assert!(caches.l1 <= caches.l2);
    }
}
