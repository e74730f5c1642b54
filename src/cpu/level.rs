//! Which instructions a call uses: a level, found at run time and chosen once for each public call.

use super::simd::portable::Portable;
use super::simd::{Kernel, Simd};
use crate::error::{Error, Result};

#[cfg(target_arch = "x86_64")]
use super::simd::{
    avx2::Avx2,
    avx512::{Avx512, Avx512Bf16},
};

/// A set of CPU instructions that this machine has: only detection makes one.
///
/// | name | instructions |
/// |---|---|
/// | `portable` | none in particular: what the compiler may use on every CPU of the architecture |
/// | `avx2` | AVX2, FMA, F16C |
/// | `avx512` | AVX-512 F, BW, VL, DQ, and those of `avx2` |
/// | `avx512bf16` | AVX512-BF16 and VNNI, and those of `avx512` |
///
/// Levels order from slowest to fastest. Results are the same bits from call to call within a level, and differ in their
/// last bits between levels.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Level(Found);

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Found {
    Portable(Portable),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16(Avx512Bf16),
}

/// All names, slowest first, whether this machine has them or not.
const NAMES: [&str; 4] = ["portable", "avx2", "avx512", "avx512bf16"];

impl Level {
    /// The levels of this machine, slowest (`portable`) to fastest. A level of the list has those before it.
    #[cfg(target_arch = "x86_64")]
    pub fn available() -> Vec<Level> {
        let mut found = vec![Found::Portable(Portable)];
        found.extend(Avx2::detect().map(Found::Avx2));
        found.extend(Avx512::detect().map(Found::Avx512));
        found.extend(Avx512Bf16::detect().map(Found::Avx512Bf16));
        found.into_iter().map(Level).collect()
    }

    /// The levels of this machine, slowest (`portable`) to fastest. A level of the list has those before it.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn available() -> Vec<Level> {
        vec![Level(Found::Portable(Portable))]
    }

    /// The fastest level of this machine.
    pub fn best() -> Level {
        let available = Level::available();
        available[available.len() - 1]
    }

    /// The fastest level of this machine that is not above the one named by the environment variable `GATEFOLD_CPU_LEVEL`.
    ///
    /// # Errors
    /// [`Error::Value`] if the variable is not a level's name.
    pub fn detect() -> Result<Level> {
        match std::env::var_os("GATEFOLD_CPU_LEVEL") {
            None => Ok(Level::best()),
            Some(cap) => Level::capped(&cap.to_string_lossy()),
        }
    }

    /// The fastest level not above the one named.
    fn capped(cap: &str) -> Result<Level> {
        let cap = position("GATEFOLD_CPU_LEVEL", cap)?;
        let below = |level: &Level| NAMES.iter().position(|name| *name == level.name()).is_some_and(|at| at <= cap);
        Ok(Level::available().into_iter().rfind(below).unwrap_or(Level(Found::Portable(Portable))))
    }

    /// `"portable"`, `"avx2"`, `"avx512"`, `"avx512bf16"`.
    pub fn name(self) -> &'static str {
        match self.0 {
            Found::Portable(_) => NAMES[0],
            #[cfg(target_arch = "x86_64")]
            Found::Avx2(_) => NAMES[1],
            #[cfg(target_arch = "x86_64")]
            Found::Avx512(_) => NAMES[2],
            #[cfg(target_arch = "x86_64")]
            Found::Avx512Bf16(_) => NAMES[3],
        }
    }

    /// The level of that name.
    ///
    /// # Errors
    /// [`Error::Value`] if there is no such level; [`Error::Unsupported`] if this machine does not have it.
    pub fn by_name(name: &str) -> Result<Level> {
        position("level", name)?;
        let available = Level::available();
        available.iter().copied().find(|level| level.name() == name).ok_or_else(|| {
            let has: Vec<&str> = available.iter().map(|level| level.name()).collect();
            Error::unsupported("cpu", format!("level `{name}` on this machine, which has {}", has.join(", ")))
        })
    }
}

/// Where a name stands in the list.
fn position(argument: &str, name: &str) -> Result<usize> {
    let at = NAMES.iter().position(|known| *known == name);
    at.ok_or_else(|| Error::value(argument, format!("one of {}", NAMES.join(", ")), format!("{name:?}")))
}

impl std::fmt::Debug for Level {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Level({})", self.name())
    }
}

impl std::fmt::Display for Level {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Runs a kernel at a level.
#[inline(always)]
pub(crate) fn dispatch<K: Kernel>(level: Level, kernel: K) -> K::Output {
    match level.0 {
        Found::Portable(simd) => simd.run(kernel),
        #[cfg(target_arch = "x86_64")]
        Found::Avx2(simd) => simd.run(kernel),
        #[cfg(target_arch = "x86_64")]
        Found::Avx512(simd) => simd.run(kernel),
        #[cfg(target_arch = "x86_64")]
        Found::Avx512Bf16(simd) => simd.run(kernel),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_order() {
        let available = Level::available();
        assert_eq!(available[0].name(), "portable");
        assert!(available.is_sorted());
        assert_eq!(available.last(), Some(&Level::best()));
        for level in available {
            assert_eq!(Level::by_name(level.name()), Ok(level));
            assert_eq!(Level::capped(level.name()), Ok(level));
        }
        assert_eq!(Level::capped("avx512bf16"), Ok(Level::best()));
    }

    #[test]
    fn errors() {
        let error = Level::capped("sse9").unwrap_err();
        assert_eq!(
            error.to_string(),
            "`GATEFOLD_CPU_LEVEL` is \"sse9\", expected one of portable, avx2, avx512, avx512bf16"
        );
        assert!(matches!(Level::by_name(""), Err(Error::Value { .. })));
        for name in NAMES {
            match Level::by_name(name) {
                Ok(level) => assert_eq!(level.name(), name),
                Err(error) => assert!(matches!(error, Error::Unsupported { .. })),
            }
        }
    }
}
