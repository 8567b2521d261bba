//! A few numbers side by side, as a processor computes them at once: one trait, and what each instruction set makes of it.

use super::product::{self, Tile};

/// A vector of f32.
///
/// # Safety
/// Everything here may only be called where the processor has the instructions of the type, from a function that is compiled
/// for them. Pointers must be good for [`Lanes::N`] numbers.
pub(super) unsafe trait Lanes: Copy {
    const N: usize;
    /// Half as many numbers; the same where there is no such type.
    type Half: Lanes;
    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// `self + a × b`
    unsafe fn plus(self, a: Self, b: Self) -> Self;
    unsafe fn add(self, other: Self) -> Self;
    /// Not below and not above.
    unsafe fn clip(self, low: Self, high: Self) -> Self;
    /// Asks for the cache line of an address, which need not be anybody's.
    #[inline(always)]
    unsafe fn prefetch(_address: *const f32) {}
    /// [`product::tile`], a function of its own for each size: the registers are its own then.
    unsafe fn tile<const ROWS: usize, const VECTORS: usize>(tile: &Tile);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Lanes, Tile, product};

    // SAFETY: each call is one instruction of AVX-512F, which the caller vouches for.
    unsafe impl Lanes for __m512 {
        const N: usize = 16;
        type Half = Half;
        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            unsafe { _mm512_set1_ps(value) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { _mm512_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm512_storeu_ps(to, self) }
        }
        #[inline(always)]
        unsafe fn plus(self, a: Self, b: Self) -> Self {
            unsafe { _mm512_fmadd_ps(a, b, self) }
        }
        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            unsafe { _mm512_add_ps(self, other) }
        }
        #[inline(always)]
        unsafe fn clip(self, low: Self, high: Self) -> Self {
            unsafe { _mm512_min_ps(_mm512_max_ps(self, low), high) }
        }
        #[inline(always)]
        unsafe fn prefetch(address: *const f32) {
            unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
        }
        unsafe fn tile<const ROWS: usize, const VECTORS: usize>(tile: &Tile) {
            #[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
            unsafe fn compiled<const ROWS: usize, const VECTORS: usize>(tile: &Tile) {
                unsafe { product::tile::<__m512, ROWS, VECTORS>(tile) }
            }
            unsafe { compiled::<ROWS, VECTORS>(tile) }
        }
    }

    /// Half a vector of AVX-512, which has 32 registers for them.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Half(__m256);

    // SAFETY: each call is one instruction of AVX or FMA, which the caller vouches for.
    unsafe impl Lanes for __m256 {
        const N: usize = 8;
        type Half = Self;
        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            unsafe { _mm256_set1_ps(value) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { _mm256_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm256_storeu_ps(to, self) }
        }
        #[inline(always)]
        unsafe fn plus(self, a: Self, b: Self) -> Self {
            unsafe { _mm256_fmadd_ps(a, b, self) }
        }
        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            unsafe { _mm256_add_ps(self, other) }
        }
        #[inline(always)]
        unsafe fn clip(self, low: Self, high: Self) -> Self {
            unsafe { _mm256_min_ps(_mm256_max_ps(self, low), high) }
        }
        #[inline(always)]
        unsafe fn prefetch(address: *const f32) {
            unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
        }
        unsafe fn tile<const ROWS: usize, const VECTORS: usize>(tile: &Tile) {
            #[target_feature(enable = "avx2,fma")]
            unsafe fn compiled<const ROWS: usize, const VECTORS: usize>(tile: &Tile) {
                unsafe { product::tile::<__m256, ROWS, VECTORS>(tile) }
            }
            unsafe { compiled::<ROWS, VECTORS>(tile) }
        }
    }

    // SAFETY: the same, in functions that are compiled for AVX-512VL.
    unsafe impl Lanes for Half {
        const N: usize = 8;
        type Half = Self;
        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            Half(unsafe { __m256::splat(value) })
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            Half(unsafe { __m256::load(from) })
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { self.0.store(to) }
        }
        #[inline(always)]
        unsafe fn plus(self, a: Self, b: Self) -> Self {
            Half(unsafe { self.0.plus(a.0, b.0) })
        }
        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            Half(unsafe { self.0.add(other.0) })
        }
        #[inline(always)]
        unsafe fn clip(self, low: Self, high: Self) -> Self {
            Half(unsafe { self.0.clip(low.0, high.0) })
        }
        #[inline(always)]
        unsafe fn prefetch(address: *const f32) {
            unsafe { __m256::prefetch(address) }
        }
        unsafe fn tile<const ROWS: usize, const VECTORS: usize>(tile: &Tile) {
            #[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
            unsafe fn compiled<const ROWS: usize, const VECTORS: usize>(tile: &Tile) {
                unsafe { product::tile::<Half, ROWS, VECTORS>(tile) }
            }
            unsafe { compiled::<ROWS, VECTORS>(tile) }
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod arm {
    use std::arch::aarch64::*;

    use super::{Lanes, Tile, product};

    // SAFETY: each call is one instruction of NEON, which every aarch64 has.
    unsafe impl Lanes for float32x4_t {
        const N: usize = 4;
        type Half = Self;
        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            unsafe { vdupq_n_f32(value) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { vld1q_f32(from) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { vst1q_f32(to, self) }
        }
        #[inline(always)]
        unsafe fn plus(self, a: Self, b: Self) -> Self {
            unsafe { vfmaq_f32(self, a, b) }
        }
        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            unsafe { vaddq_f32(self, other) }
        }
        #[inline(always)]
        unsafe fn clip(self, low: Self, high: Self) -> Self {
            unsafe { vminq_f32(vmaxq_f32(self, low), high) }
        }
        #[inline(never)]
        unsafe fn tile<const ROWS: usize, const VECTORS: usize>(tile: &Tile) {
            unsafe { product::tile::<Self, ROWS, VECTORS>(tile) }
        }
    }
}

/// What the compiler makes of four numbers, on any processor.
#[derive(Clone, Copy)]
pub(super) struct Plain([f32; 4]);

// SAFETY: plain arithmetic; the pointers are good for four numbers by the trait's contract.
unsafe impl Lanes for Plain {
    const N: usize = 4;
    type Half = Self;
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Plain([value; 4])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Plain(unsafe { from.cast::<[f32; 4]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { to.cast::<[f32; 4]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn plus(self, a: Self, b: Self) -> Self {
        Plain(std::array::from_fn(|lane| self.0[lane] + a.0[lane] * b.0[lane]))
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Plain(std::array::from_fn(|lane| self.0[lane] + other.0[lane]))
    }
    #[inline(always)]
    unsafe fn clip(self, low: Self, high: Self) -> Self {
        Plain(std::array::from_fn(|lane| self.0[lane].max(low.0[lane]).min(high.0[lane])))
    }
    #[inline(never)]
    unsafe fn tile<const ROWS: usize, const VECTORS: usize>(tile: &Tile) {
        unsafe { product::tile::<Self, ROWS, VECTORS>(tile) }
    }
}
