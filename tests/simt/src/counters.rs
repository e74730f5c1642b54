//! What a kernel costs, in counts that do not depend on the schedule.

use crate::op::Class;

/// Counts of one launch. Equal for every seed in lock-step mode; iterations of loops that poll an mbarrier are not counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    by_class: [u64; Class::ALL.len()],
    /// Warp instructions.
    pub instructions: u64,
    /// Lanes that executed them; over `32 * instructions` this is the occupancy of lanes.
    pub lane_instructions: u64,
    /// Warp-level requests to global memory.
    pub global_requests: u64,
    /// 32-byte sectors that these touch.
    pub global_sectors: u64,
    /// Bytes that lanes asked for.
    pub global_bytes: u64,
    /// Warp-level requests to shared memory.
    pub shared_requests: u64,
    /// Wavefronts that these take, with bank conflicts.
    pub shared_wavefronts: u64,
    /// Wavefronts without conflicts.
    pub shared_ideal_wavefronts: u64,
    /// Operations of `mma` and `wgmma`, two per multiply-add.
    pub mma_flops: u64,
    /// Bytes moved by bulk and tensor copies.
    pub tma_bytes: u64,
    /// Barriers that warps executed.
    pub barriers: u64,
    /// Branches at which a warp diverged.
    pub divergent_branches: u64,
}

impl Counters {
    /// Warp instructions of a class.
    pub fn class(&self, class: Class) -> u64 {
        self.by_class[class as usize]
    }

    /// Sectors per global request; 4 is ideal for 4-byte, 16 for 16-byte accesses of full warps.
    pub fn sectors_per_request(&self) -> f64 {
        ratio(self.global_sectors, self.global_requests)
    }

    /// Wavefronts over wavefronts without conflicts; 1 is ideal.
    pub fn conflict_degree(&self) -> f64 {
        ratio(self.shared_wavefronts, self.shared_ideal_wavefronts)
    }

    /// Share of lanes that were active.
    pub fn lane_occupancy(&self) -> f64 {
        ratio(self.lane_instructions, 32 * self.instructions)
    }

    #[inline]
    pub(crate) fn instruction(&mut self, class: Class, lanes: u32) {
        self.by_class[class as usize] += 1;
        self.instructions += 1;
        self.lane_instructions += u64::from(lanes.count_ones());
    }

    pub(crate) fn uncount(&mut self, class: Class, lanes: u32) {
        self.by_class[class as usize] -= 1;
        self.instructions -= 1;
        self.lane_instructions -= u64::from(lanes.count_ones());
    }

    /// One request to global memory.
    pub(crate) fn global(&mut self, addresses: &[u64; 32], mask: u32, bytes: u32) {
        self.global_requests += 1;
        self.global_bytes += u64::from(mask.count_ones() * bytes);
        let mut sectors = [0u64; 32];
        let mut n = 0;
        let mut sorted = true;
        let mut rest = mask;
        while rest != 0 {
            let lane = rest.trailing_zeros() as usize;
            rest &= rest - 1;
            sectors[n] = addresses[lane] >> 5;
            sorted &= n == 0 || sectors[n - 1] <= sectors[n];
            n += 1;
        }
        if !sorted {
            sectors[..n].sort_unstable();
        }
        let repeats = sectors[..n].windows(2).filter(|w| w[0] == w[1]).count();
        self.global_sectors += (n - repeats) as u64;
    }

    /// One request to shared memory: phases of 32, 16 or 8 lanes, each as many wavefronts as its fullest bank has words.
    pub(crate) fn shared(&mut self, addresses: &[u64; 32], mask: u32, bytes: u32) {
        self.shared_requests += 1;
        let lanes = if bytes <= 4 { 32 } else { 128 / bytes };
        for phase in 0..32 / lanes {
            let part = mask >> (phase * lanes) & (u32::MAX >> (32 - lanes));
            if part == 0 {
                continue;
            }
            self.shared_ideal_wavefronts += 1;
            self.shared_wavefronts += u64::from(wavefronts(addresses, part, phase * lanes, bytes));
        }
    }
}

fn ratio(a: u64, b: u64) -> f64 {
    if b == 0 { 0.0 } else { a as f64 / b as f64 }
}

fn wavefronts(addresses: &[u64; 32], mut part: u32, first: u32, bytes: u32) -> u32 {
    let mut words = [u32::MAX; 32];
    let mut counts = [0u8; 32];
    let mut more = [0u32; 32];
    let mut n = 0;
    while part != 0 {
        let lane = (first + part.trailing_zeros()) as usize;
        part &= part - 1;
        let start = addresses[lane] as u32 >> 2;
        for word in start..start + bytes.div_ceil(4) {
            let bank = word as usize & 31;
            if counts[bank] == 0 {
                words[bank] = word;
                counts[bank] = 1;
            } else if words[bank] != word && !more[..n].contains(&word) {
                more[n] = word;
                n += 1;
                counts[bank] += 1;
            }
        }
    }
    u32::from(counts.into_iter().max().unwrap_or(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared(bytes: u32, address: impl Fn(u64) -> u64) -> (u64, u64) {
        let mut c = Counters::default();
        c.shared(&std::array::from_fn(|i| address(i as u64)), u32::MAX, bytes);
        (c.shared_wavefronts, c.shared_ideal_wavefronts)
    }

    #[test]
    fn wavefronts_by_hand() {
        assert_eq!(shared(4, |i| 4 * i), (1, 1));
        assert_eq!(shared(4, |_| 64), (1, 1), "one word is broadcast");
        assert_eq!(shared(4, |i| 8 * i), (2, 1), "stride 2 words: two-way conflict");
        assert_eq!(shared(4, |i| 128 * i), (32, 1), "one bank");
        assert_eq!(shared(2, |i| 2 * i), (1, 1));
        assert_eq!(shared(8, |i| 8 * i), (2, 2));
        assert_eq!(shared(16, |i| 16 * i), (4, 4));
        assert_eq!(shared(16, |i| 128 * i), (32, 4), "eight rows of a tile without a swizzle");
        assert_eq!(shared(16, |i| 128 * i + 16 * (i % 8)), (4, 4), "with the XOR swizzle");
    }

    #[test]
    fn sectors_by_hand() {
        let count = |mask, bytes, address: &dyn Fn(u64) -> u64| {
            let mut c = Counters::default();
            c.global(&std::array::from_fn(|i| address(i as u64)), mask, bytes);
            (c.global_sectors, c.global_bytes)
        };
        assert_eq!(count(u32::MAX, 4, &|i| 4 * i), (4, 128));
        assert_eq!(count(u32::MAX, 4, &|i| 4 * (31 - i)), (4, 128), "order does not matter");
        assert_eq!(count(u32::MAX, 4, &|i| 128 * i), (32, 128));
        assert_eq!(count(u32::MAX, 16, &|i| 16 * i), (16, 512));
        assert_eq!(count(1, 1, &|_| 31), (1, 1));
    }
}
