//! Instruction sets, and one trait for their vectors of f32.

use crate::depthwise::{self, DepthwiseArgs};
use crate::gemm::{self, GemmArgs, PanelLayout, Tile};

/// An instruction set that the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Isa {
    /// x86-64 with AVX-512F and AVX-512VL.
    Avx512,
    /// x86-64 with AVX2 and FMA.
    Avx2,
    /// 64-bit ARM.
    Neon,
    /// Rust without intrinsics, for every processor.
    Portable,
}

impl Isa {
    /// All instruction sets, the fastest first.
    pub const ALL: [Isa; 4] = [Isa::Avx512, Isa::Avx2, Isa::Neon, Isa::Portable];

    /// Returns the name in lower case: `avx512`, `avx2`, `neon` or `portable`.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Avx512 => "avx512",
            Isa::Avx2 => "avx2",
            Isa::Neon => "neon",
            Isa::Portable => "portable",
        }
    }

    /// Returns whether this processor supports the instruction set.
    pub fn is_supported(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            Isa::Neon => cfg!(target_arch = "aarch64"),
            Isa::Portable => true,
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// Returns the fastest instruction set that this processor supports.
    pub fn best() -> Isa {
        Isa::ALL.into_iter().find(|isa| isa.is_supported()).unwrap_or(Isa::Portable)
    }

    /// Returns the number of f32 in a vector, which is the size of a channel block.
    pub(crate) fn lanes(self) -> usize {
        self.panel_layout().lanes
    }

    /// Returns the layout of the panels that [`gemm::PackedGemm`] is packed in.
    pub(crate) fn panel_layout(self) -> PanelLayout {
        let (lanes, vectors, half_vectors) = match self {
            Isa::Avx512 => (16, 2, true),
            Isa::Avx2 => (8, 2, false),
            Isa::Neon => (4, 4, false),
            Isa::Portable => (4, 2, false),
        };
        PanelLayout { lanes, vectors, half_vectors }
    }

    /// Computes a 1×1 convolution.
    ///
    /// # Panics
    /// If the processor lacks the instruction set or the arguments exceed their slices.
    pub(crate) fn gemm(self, args: &mut GemmArgs<'_>) {
        assert!(self.is_supported(), "this processor lacks {}", self.name());
        // SAFETY: the processor supports the instruction set, by the assertion above.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => gemm::run::<std::arch::x86_64::__m512, 14, 2>(args),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => gemm::run::<std::arch::x86_64::__m256, 6, 2>(args),
                #[cfg(target_arch = "aarch64")]
                Isa::Neon => gemm::run::<std::arch::aarch64::float32x4_t, 6, 4>(args),
                _ => gemm::run::<PortableF32x4, 6, 2>(args),
            }
        }
    }

    /// Computes a depthwise convolution.
    ///
    /// # Panics
    /// If the processor lacks the instruction set or the arguments exceed their slices.
    pub(crate) fn depthwise(self, args: &mut DepthwiseArgs<'_>) {
        assert!(self.is_supported(), "this processor lacks {}", self.name());
        // SAFETY: the processor supports the instruction set, by the assertion above. Each x86 wrapper is compiled for it; NEON is
        // part of every aarch64 target, and the portable kernel needs nothing.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => depthwise_avx512(args),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => depthwise_avx2(args),
                #[cfg(target_arch = "aarch64")]
                Isa::Neon => depthwise::run::<std::arch::aarch64::float32x4_t>(args),
                _ => depthwise::run::<PortableF32x4>(args),
            }
        }
    }
}

/// [`depthwise::run`] compiled for AVX-512.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
fn depthwise_avx512(args: &mut DepthwiseArgs<'_>) {
    // SAFETY: this function is compiled for AVX-512, and callable only where the processor supports it.
    unsafe { depthwise::run::<std::arch::x86_64::__m512>(args) }
}

/// [`depthwise::run`] compiled for AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn depthwise_avx2(args: &mut DepthwiseArgs<'_>) {
    // SAFETY: this function is compiled for AVX2 and FMA, and callable only where the processor supports them.
    unsafe { depthwise::run::<std::arch::x86_64::__m256>(args) }
}

/// A vector of f32.
///
/// # Safety
/// Each function may be called only if the processor supports the instruction set of the type, from a function that is compiled for
/// it. Pointers must be valid for [`SimdF32::LANES`] values; they need no alignment beyond that of f32.
pub(crate) unsafe trait SimdF32: Copy {
    /// Number of f32 in the vector.
    const LANES: usize;
    /// A vector of half as many f32, or `Self` if the instruction set has no use for one.
    type Half: SimdF32;
    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// Computes `self + a × b`.
    unsafe fn mul_add(self, a: Self, b: Self) -> Self;
    unsafe fn add(self, other: Self) -> Self;
    /// Computes `min(max(self, low), high)`.
    unsafe fn clip(self, low: Self, high: Self) -> Self;
    /// Prefetches the cache line of an address, which need not be valid.
    #[inline(always)]
    unsafe fn prefetch(_address: *const f32) {}
    /// Runs [`gemm::compute_tile`] as a function of its own for each size, so that the sums stay in registers.
    unsafe fn compute_tile<const ROWS: usize, const VECTORS: usize>(tile: &Tile);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{SimdF32, Tile, gemm};

    // SAFETY: `LANES` is the number of f32 in the type, and each function accesses no more than that from a pointer on.
    unsafe impl SimdF32 for __m512 {
        const LANES: usize = 16;
        type Half = HalfF32x8;
        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            // SAFETY: the caller guarantees AVX-512F.
            unsafe { _mm512_set1_ps(value) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: the caller guarantees AVX-512F and 16 readable values; the load is unaligned.
            unsafe { _mm512_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: the caller guarantees AVX-512F and 16 writable values; the store is unaligned.
            unsafe { _mm512_storeu_ps(to, self) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, a: Self, b: Self) -> Self {
            // SAFETY: the caller guarantees AVX-512F.
            unsafe { _mm512_fmadd_ps(a, b, self) }
        }
        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            // SAFETY: the caller guarantees AVX-512F.
            unsafe { _mm512_add_ps(self, other) }
        }
        #[inline(always)]
        unsafe fn clip(self, low: Self, high: Self) -> Self {
            // SAFETY: the caller guarantees AVX-512F.
            unsafe { _mm512_min_ps(_mm512_max_ps(self, low), high) }
        }
        #[inline(always)]
        unsafe fn prefetch(address: *const f32) {
            // SAFETY: a prefetch of an invalid address has no effect; SSE is part of every x86-64 target.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
        }
        unsafe fn compute_tile<const ROWS: usize, const VECTORS: usize>(tile: &Tile) {
            #[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
            unsafe fn compiled<const ROWS: usize, const VECTORS: usize>(tile: &Tile) {
                // SAFETY: this function is compiled for AVX-512; the tile's pointers are valid by the caller's contract.
                unsafe { gemm::compute_tile::<__m512, ROWS, VECTORS>(tile) }
            }
            // SAFETY: the caller guarantees AVX-512F and AVX-512VL, and a valid tile.
            unsafe { compiled::<ROWS, VECTORS>(tile) }
        }
    }

    /// Half a vector of AVX-512: like `__m256`, in functions compiled for AVX-512VL, which has 32 registers for it.
    #[derive(Clone, Copy)]
    pub(crate) struct HalfF32x8(__m256);

    // SAFETY: `LANES` is the number of f32 in the type, and each function accesses no more than that from a pointer on.
    unsafe impl SimdF32 for __m256 {
        const LANES: usize = 8;
        type Half = Self;
        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            // SAFETY: the caller guarantees AVX.
            unsafe { _mm256_set1_ps(value) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: the caller guarantees AVX and 8 readable values; the load is unaligned.
            unsafe { _mm256_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: the caller guarantees AVX and 8 writable values; the store is unaligned.
            unsafe { _mm256_storeu_ps(to, self) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, a: Self, b: Self) -> Self {
            // SAFETY: the caller guarantees FMA.
            unsafe { _mm256_fmadd_ps(a, b, self) }
        }
        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            // SAFETY: the caller guarantees AVX.
            unsafe { _mm256_add_ps(self, other) }
        }
        #[inline(always)]
        unsafe fn clip(self, low: Self, high: Self) -> Self {
            // SAFETY: the caller guarantees AVX.
            unsafe { _mm256_min_ps(_mm256_max_ps(self, low), high) }
        }
        #[inline(always)]
        unsafe fn prefetch(address: *const f32) {
            // SAFETY: a prefetch of an invalid address has no effect; SSE is part of every x86-64 target.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
        }
        unsafe fn compute_tile<const ROWS: usize, const VECTORS: usize>(tile: &Tile) {
            #[target_feature(enable = "avx2,fma")]
            unsafe fn compiled<const ROWS: usize, const VECTORS: usize>(tile: &Tile) {
                // SAFETY: this function is compiled for AVX2 and FMA; the tile's pointers are valid by the caller's contract.
                unsafe { gemm::compute_tile::<__m256, ROWS, VECTORS>(tile) }
            }
            // SAFETY: the caller guarantees AVX2 and FMA, and a valid tile.
            unsafe { compiled::<ROWS, VECTORS>(tile) }
        }
    }

    // SAFETY: each function is that of `__m256`, whose instructions AVX-512VL includes.
    unsafe impl SimdF32 for HalfF32x8 {
        const LANES: usize = 8;
        type Half = Self;
        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            // SAFETY: the same contract.
            HalfF32x8(unsafe { __m256::splat(value) })
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: the same contract, for as many values.
            HalfF32x8(unsafe { __m256::load(from) })
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: the same contract, for as many values.
            unsafe { self.0.store(to) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, a: Self, b: Self) -> Self {
            // SAFETY: the same contract.
            HalfF32x8(unsafe { self.0.mul_add(a.0, b.0) })
        }
        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            // SAFETY: the same contract.
            HalfF32x8(unsafe { self.0.add(other.0) })
        }
        #[inline(always)]
        unsafe fn clip(self, low: Self, high: Self) -> Self {
            // SAFETY: the same contract.
            HalfF32x8(unsafe { self.0.clip(low.0, high.0) })
        }
        #[inline(always)]
        unsafe fn prefetch(address: *const f32) {
            // SAFETY: the same contract.
            unsafe { __m256::prefetch(address) }
        }
        unsafe fn compute_tile<const ROWS: usize, const VECTORS: usize>(tile: &Tile) {
            #[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
            unsafe fn compiled<const ROWS: usize, const VECTORS: usize>(tile: &Tile) {
                // SAFETY: this function is compiled for AVX-512VL; the tile's pointers are valid by the caller's contract.
                unsafe { gemm::compute_tile::<HalfF32x8, ROWS, VECTORS>(tile) }
            }
            // SAFETY: the caller guarantees AVX-512VL, and a valid tile.
            unsafe { compiled::<ROWS, VECTORS>(tile) }
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod arm {
    use std::arch::aarch64::*;

    use super::{SimdF32, Tile, gemm};

    // SAFETY: `LANES` is the number of f32 in the type, and each function accesses no more than that from a pointer on.
    unsafe impl SimdF32 for float32x4_t {
        const LANES: usize = 4;
        type Half = Self;
        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            // SAFETY: NEON is part of every aarch64 target.
            unsafe { vdupq_n_f32(value) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: NEON is part of every aarch64 target; the caller guarantees 4 readable values.
            unsafe { vld1q_f32(from) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: NEON is part of every aarch64 target; the caller guarantees 4 writable values.
            unsafe { vst1q_f32(to, self) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, a: Self, b: Self) -> Self {
            // SAFETY: NEON is part of every aarch64 target.
            unsafe { vfmaq_f32(self, a, b) }
        }
        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            // SAFETY: NEON is part of every aarch64 target.
            unsafe { vaddq_f32(self, other) }
        }
        #[inline(always)]
        unsafe fn clip(self, low: Self, high: Self) -> Self {
            // SAFETY: NEON is part of every aarch64 target.
            unsafe { vminq_f32(vmaxq_f32(self, low), high) }
        }
        #[inline(never)]
        unsafe fn compute_tile<const ROWS: usize, const VECTORS: usize>(tile: &Tile) {
            // SAFETY: NEON is part of every aarch64 target; the tile is valid by the caller's contract.
            unsafe { gemm::compute_tile::<Self, ROWS, VECTORS>(tile) }
        }
    }
}

/// Four f32 in plain Rust, which the compiler vectorises as far as its target allows.
#[derive(Clone, Copy)]
pub(crate) struct PortableF32x4([f32; 4]);

// SAFETY: `LANES` is the length of the array, and each function accesses no more than that from a pointer on.
unsafe impl SimdF32 for PortableF32x4 {
    const LANES: usize = 4;
    type Half = Self;
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        PortableF32x4([value; 4])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller guarantees 4 readable values; the read is unaligned.
        PortableF32x4(unsafe { from.cast::<[f32; 4]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller guarantees 4 writable values; the write is unaligned.
        unsafe { to.cast::<[f32; 4]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn mul_add(self, a: Self, b: Self) -> Self {
        PortableF32x4(std::array::from_fn(|lane| self.0[lane] + a.0[lane] * b.0[lane]))
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        PortableF32x4(std::array::from_fn(|lane| self.0[lane] + other.0[lane]))
    }
    #[inline(always)]
    unsafe fn clip(self, low: Self, high: Self) -> Self {
        PortableF32x4(std::array::from_fn(|lane| self.0[lane].max(low.0[lane]).min(high.0[lane])))
    }
    #[inline(never)]
    unsafe fn compute_tile<const ROWS: usize, const VECTORS: usize>(tile: &Tile) {
        // SAFETY: the type needs no instruction set; the tile is valid by the caller's contract.
        unsafe { gemm::compute_tile::<Self, ROWS, VECTORS>(tile) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_isa_is_supported_and_the_portable_one_always_is() {
        assert!(Isa::best().is_supported());
        assert!(Isa::Portable.is_supported());
        let first = Isa::ALL.into_iter().find(|isa| isa.is_supported());
        assert_eq!(first, Some(Isa::best()));
    }
}
