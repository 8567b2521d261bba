//! MobileNet's pieces, faster than tract has them: what a frame spends its time in.
//!
//! tract loads the network and runs all else. Where its graph holds a run of 1×1, depthwise and first convolutions, clips, residuals
//! and a mean over all places, one operator of ours takes their place (`graph`): channels last, weights packed once, a block of
//! expansion, depthwise and projection computed on strips of rows that stay in the second-level cache (`block`).
//! `BLOOMCAST_KERNELS=tract` leaves all to tract, `=plain`, `avx2`, `avx512`, `neon` asks for one set of instructions.

#![expect(
    unsafe_code,
    reason = "the instructions of a processor; each block has its argument, each kernel is checked against tract"
)]

mod account;
mod block;
mod chain;
mod depthwise;
mod graph;
mod lanes;
mod layers;
mod product;
mod team;
mod threads;

pub use account::{Part, peak};
pub(super) use graph::{Taken, Whole, replace};
pub use team::{THREADS_MAX, Team, all_but_one};

use std::sync::OnceLock;

/// What the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Instructions {
    Avx512,
    Avx2,
    Neon,
    /// What the compiler makes of them, for every other processor.
    Plain,
}

impl Instructions {
    pub const ALL: [Instructions; 4] =
        [Instructions::Avx512, Instructions::Avx2, Instructions::Neon, Instructions::Plain];

    pub fn name(self) -> &'static str {
        match self {
            Instructions::Avx512 => "avx512",
            Instructions::Avx2 => "avx2",
            Instructions::Neon => "neon",
            Instructions::Plain => "plain",
        }
    }

    /// Whether this processor has them.
    pub fn are_there(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("fma")
            }
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            Instructions::Neon => cfg!(target_arch = "aarch64"),
            Instructions::Plain => true,
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// The panels that a [`product::Product`] is packed in.
    fn panels(self) -> product::Panels {
        let (lanes, vectors, halves) = match self {
            Instructions::Avx512 => (16, 2, true),
            Instructions::Avx2 => (8, 2, false),
            Instructions::Neon => (4, 4, false),
            Instructions::Plain => (4, 2, false),
        };
        product::Panels { lanes, vectors, halves }
    }

    fn product(self, job: &mut product::Job<'_>) {
        debug_assert!(self.are_there());
        // SAFETY: what calls this makes sure that the processor has the instructions (`graph::replace`, `account::peak`).
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Instructions::Avx512 => product::run::<std::arch::x86_64::__m512, 14, 2>(job),
                #[cfg(target_arch = "x86_64")]
                Instructions::Avx2 => product::run::<std::arch::x86_64::__m256, 6, 2>(job),
                #[cfg(target_arch = "aarch64")]
                Instructions::Neon => product::run::<std::arch::aarch64::float32x4_t, 6, 4>(job),
                _ => product::run::<lanes::Plain, 6, 2>(job),
            }
        }
    }

    fn depthwise(self, job: &mut depthwise::Job<'_>) {
        debug_assert!(self.are_there());
        // SAFETY: as above.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Instructions::Avx512 => depthwise_avx512(job),
                #[cfg(target_arch = "x86_64")]
                Instructions::Avx2 => depthwise_avx2(job),
                #[cfg(target_arch = "aarch64")]
                Instructions::Neon => depthwise::run::<std::arch::aarch64::float32x4_t>(job),
                _ => depthwise::run::<lanes::Plain>(job),
            }
        }
    }
}

// SAFETY: only called where the processor has the instructions.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
unsafe fn depthwise_avx512(job: &mut depthwise::Job<'_>) {
    unsafe { depthwise::run::<std::arch::x86_64::__m512>(job) }
}

// SAFETY: the same.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn depthwise_avx2(job: &mut depthwise::Job<'_>) {
    unsafe { depthwise::run::<std::arch::x86_64::__m256>(job) }
}

/// The name of a set of kernels; without one, tract's own operators.
pub fn named(kernels: Option<Instructions>) -> &'static str {
    kernels.map_or("tract", Instructions::name)
}

/// The set of instructions that this process uses, chosen once; none: tract's own operators.
pub fn chosen() -> Option<Instructions> {
    static CHOSEN: OnceLock<Option<Instructions>> = OnceLock::new();
    *CHOSEN.get_or_init(|| {
        let asked = std::env::var("BLOOMCAST_KERNELS").unwrap_or_default();
        if asked == "tract" {
            return None;
        }
        let there = |instructions: &Instructions| instructions.are_there();
        let best = Instructions::ALL.into_iter().find(there);
        let named = Instructions::ALL.into_iter().filter(there).find(|instructions| instructions.name() == asked);
        if named.is_none() && !asked.is_empty() {
            tracing::warn!("BLOOMCAST_KERNELS={asked}: this processor has no such kernels");
        }
        named.or(best)
    })
}

#[cfg(test)]
mod tests;
