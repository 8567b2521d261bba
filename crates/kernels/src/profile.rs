//! The cost of a network's layers, and the peak speed of a processor.

use std::time::{Duration, Instant};

use crate::gemm::{GemmArgs, InputStrides, OutputStrides, PackedGemm, PanelLayout};
use crate::inverted_residual::InvertedResidual;
use crate::layers::{BlockGeometry, Clip, CompiledLayer, DenseConv, FeatureMapShape, PackedLayer};
use crate::simd::Isa;

/// The cost of a layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerProfile {
    /// Kernels, channels and output size, such as `1×1 24 → 144, 3×3 depthwise, 1×1 → 24, 56×56`.
    pub name: String,
    /// Multiply-accumulate operations for one image.
    pub macs: u64,
    /// Wall-clock time in the last run.
    pub time: Duration,
}

/// Returns the profiles of the layers with the times of their last run.
pub(crate) fn profile(layers: &[CompiledLayer], times: &[Duration]) -> Vec<LayerProfile> {
    let layer_profile = |(layer, time): (&CompiledLayer, &Duration)| {
        let (name, macs) = name_and_macs(layer);
        let FeatureMapShape { height, width, .. } = layer.to;
        LayerProfile { name: format!("{name}, {width}×{height}"), macs, time: *time }
    };
    layers.iter().zip(times).map(layer_profile).collect()
}

fn name_and_macs(layer: &CompiledLayer) -> (String, u64) {
    let (from, to) = (layer.from.channels, layer.to.channels);
    match &layer.packed {
        PackedLayer::GlobalSum { .. } => ("mean".into(), product(layer.from.len(), 1)),
        PackedLayer::Conv { conv, .. } => {
            (format!("{} {from} → {to}", kernel_name(conv)), product(taps(conv), layer.to.len()))
        }
        PackedLayer::InvertedResidual(block) => {
            let InvertedResidual { expand, project, geometry, .. } = &**block;
            let BlockGeometry { kernel, expanded, convolved, .. } = *geometry;
            let mut name = String::new();
            let mut macs = product(kernel * kernel, convolved.len());
            if let Some(conv) = expand {
                name = format!("{} {from} → {}, ", kernel_name(conv), expanded.channels);
                macs = macs.saturating_add(product(taps(conv), expanded.len()));
            }
            name += &format!("{kernel}×{kernel} depthwise");
            if project.is_some() {
                name += &format!(", 1×1 → {to}");
                macs = macs.saturating_add(product(convolved.channels, layer.to.len()));
            }
            (name, macs)
        }
    }
}

/// Multiplies counts that fit usize; the product may need more on a 32-bit processor.
fn product(a: usize, b: usize) -> u64 {
    (a as u64).saturating_mul(b as u64)
}

fn kernel_name(conv: &DenseConv) -> String {
    let kernel = match conv {
        DenseConv::Pointwise(_) => 1,
        DenseConv::Patch(conv) => conv.kernel,
    };
    format!("{kernel}×{kernel}")
}

/// Returns the inputs of one output.
fn taps(conv: &DenseConv) -> usize {
    match conv {
        DenseConv::Pointwise(gemm) => gemm.inputs,
        DenseConv::Patch(conv) => conv.gemm.inputs,
    }
}

/// Measures the multiply-accumulate operations per second of one core with all data in registers and the first-level cache: the best of
/// 1000 runs of a small matrix product.
///
/// # Panics
/// If the processor lacks the instruction set.
pub fn peak_macs_per_second(isa: Isa) -> f64 {
    const INPUTS: usize = 128;
    const PIXELS: usize = 84;
    const RUNS: usize = 1000;
    assert!(isa.is_supported(), "this processor lacks {}", isa.name());
    let layout @ PanelLayout { lanes, .. } = isa.panel_layout();
    let outputs = layout.width();
    let (weights, bias) = (vec![1.0; outputs * INPUTS], vec![0.0; outputs]);
    let gemm = PackedGemm::new(&weights, &bias, [outputs, INPUTS], Clip::NONE, layout);
    let (input, mut out) = (vec![1.0; INPUTS], vec![0.0; PIXELS * outputs]);
    let (pixel_stride, row_stride) = (outputs, PIXELS * outputs);
    let mut best = Duration::MAX;
    for _ in 0..RUNS {
        let began = Instant::now();
        isa.gemm(&mut GemmArgs {
            gemm: &gemm,
            outputs: 0..outputs,
            input: &input,
            input_strides: InputStrides { pixel_stride: 0, segments: 1, segment_stride: 0 },
            pixels: PIXELS,
            residual: None,
            out: &mut out,
            output_strides: OutputStrides { width: PIXELS, pixel_stride, row_stride, vector_stride: lanes },
        });
        best = best.min(began.elapsed());
    }
    (PIXELS * outputs * INPUTS) as f64 / best.as_secs_f64()
}
