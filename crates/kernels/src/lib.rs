//! SIMD kernels for MobileNet-like convolutional networks on CPUs.
//!
//! A [`CompiledNet`] computes a sequence of [`Layer`]s, one image at a time: 1×1, depthwise and first convolutions with clips and
//! residuals, and the sum over all pixels. Channels are stored last, weights are packed once, and an inverted residual block is computed
//! on strips of rows that stay in the second-level cache. Kernels exist for AVX-512, AVX2 and NEON and in portable Rust ([`Isa`]); the
//! threads of a [`ThreadPool`] share an image.
//!
//! ```
//! use bloomcast_kernels::{Clip, CompiledNet, Conv2d, FeatureMapShape, Isa, Layer, Padding, Workspace};
//!
//! // A 1×1 convolution from one channel to two, at two pixels: y = [x, 2 x + 1].
//! let conv = Conv2d {
//!     weights: vec![1.0, 2.0],
//!     bias: vec![0.0, 1.0],
//!     kernel: 1,
//!     stride: 1,
//!     padding: Padding::NONE,
//!     clip: Clip::NONE,
//! };
//! let input = FeatureMapShape { height: 1, width: 2, channels: 1 };
//! let net = CompiledNet::new(input, &[Layer::Conv { conv, residual: false }], false, Isa::best(), None)?;
//! let mut out = [0.0; 4];
//! net.run(&[3.0, 5.0], &mut out, &mut Workspace::default());
//! assert_eq!(out, [3.0, 7.0, 5.0, 11.0]);
//! # Ok::<(), bloomcast_kernels::KernelError>(())
//! ```

#![deny(missing_docs)]
#![allow(unsafe_code, reason = "all unsafe code of the program is here")]

mod compile;
mod compiled_net;
mod cpu_time;
mod depthwise;
mod error;
mod gemm;
mod inverted_residual;
mod layers;
mod partition;
mod profile;
mod simd;
#[cfg(test)]
mod test_util;
mod thread_pool;

pub use compiled_net::{CompiledNet, Workspace};
pub use cpu_time::{CpuTime, thread_cpu_time};
pub use error::{KernelError, VALUES_MAX};
pub use layers::{Clip, Conv2d, FeatureMapShape, Layer, Padding};
pub use profile::{LayerProfile, peak_macs_per_second};
pub use simd::Isa;
pub use thread_pool::{THREADS_MAX, ThreadPool, default_threads};
