//! The device that extracts features: the CPU, or a GPU whose features are close to the CPU's.

use std::panic::{self, AssertUnwindSafe};

use serde::{Deserialize, Serialize};

use crate::vision::backbone::ComputeDevice;
use crate::vision::{BackboneError, CompiledBackbone, OnnxBackbone};

/// Largest accepted difference of GPU features, relative to the largest CPU feature; the convolutions round differently.
const DIFFERENCE_MAX: f32 = 0.01;

/// The device to extract features with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ComputeDeviceChoice {
    /// A GPU if the program is built with the feature `cuda` and a GPU works; the CPU otherwise.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU; the CPU, with a warning, if no GPU works.
    Gpu,
}

/// A network and its backbone on the selected device.
pub struct Selected {
    /// The network, with its device set to the selected one.
    pub network: OnnxBackbone,
    /// The backbone of `network`.
    pub backbone: CompiledBackbone,
    /// Reason why the CPU is used although a GPU was requested.
    pub fallback: Option<GpuFallback>,
}

/// Reason why the GPU is not used.
#[derive(Debug, thiserror::Error)]
pub enum GpuFallback {
    /// The difference, relative to the largest CPU feature.
    #[error("the GPU's features differ from the CPU's by {:.1} %; the CPU computes the features", .0 * 100.0)]
    Difference(f32),
    /// The backbone cannot be built or run on the GPU.
    #[error("{0}; the CPU computes the features")]
    Backbone(BackboneError),
    /// The CUDA runtime panicked, for example because a part of it is not installed.
    #[error("the CUDA runtime panicked, see its message above; the CPU computes the features")]
    Panic,
}

/// Selects the device for `choice`; `build` makes the backbone of a network. A GPU is used only if its output for a test
/// input is within 1 % of the CPU's.
///
/// # Errors
/// Fails if `build` fails on the CPU.
pub fn select(
    network: OnnxBackbone,
    choice: ComputeDeviceChoice,
    build: &dyn Fn(&OnnxBackbone) -> Result<CompiledBackbone, BackboneError>,
) -> Result<Selected, BackboneError> {
    let on_cpu = build(&network)?;
    let try_gpu = match choice {
        ComputeDeviceChoice::Auto => cfg!(feature = "cuda"),
        ComputeDeviceChoice::Cpu => false,
        ComputeDeviceChoice::Gpu => true,
    };
    if !try_gpu {
        return Ok(Selected { network, backbone: on_cpu, fallback: None });
    }
    let gpu = network.on(ComputeDevice::Cuda);
    let side = network.input_size();
    // The CUDA runtime may panic if a part of it is not installed.
    let result = panic::catch_unwind(AssertUnwindSafe(|| {
        let on_gpu = build(&gpu)?;
        Ok::<_, BackboneError>((relative_difference(&on_cpu, &on_gpu, 3 * side * side)?, on_gpu))
    }));
    let fallback = match result {
        Ok(Ok((difference, on_gpu))) if difference <= DIFFERENCE_MAX => {
            return Ok(Selected { network: gpu, backbone: on_gpu, fallback: None });
        }
        Ok(Ok((difference, _))) => GpuFallback::Difference(difference),
        Ok(Err(error)) => GpuFallback::Backbone(error),
        Err(_) => GpuFallback::Panic,
    };
    Ok(Selected { network, backbone: on_cpu, fallback: Some(fallback) })
}

/// Returns the largest absolute difference of the outputs for one test input, divided by the largest CPU output.
fn relative_difference(cpu: &CompiledBackbone, gpu: &CompiledBackbone, input_len: usize) -> Result<f32, BackboneError> {
    let input: Vec<f32> = (0..input_len).map(|i| (i as f32 * 0.37).sin()).collect();
    let (mut cpu, mut gpu) = (cpu.session()?, gpu.session()?);
    let (expected, actual) = (cpu.run(&input)?, gpu.run(&input)?);
    let largest = expected.iter().fold(f32::MIN_POSITIVE, |largest, v| largest.max(v.abs()));
    // `f32::max` ignores NaN, so a value that is not finite counts as infinitely different.
    let difference = |(a, b): (&f32, &f32)| if b.is_finite() { (a - b).abs() } else { f32::INFINITY };
    Ok(expected.iter().zip(actual).map(difference).fold(0.0, f32::max) / largest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn features(network: &OnnxBackbone) -> Result<CompiledBackbone, BackboneError> {
        network.compile_features(None)
    }

    #[test]
    fn difference_is_relative_to_the_largest_feature() {
        let network = OnnxBackbone::built_in().unwrap();
        let own = &network.last_conv().unwrap().weights;
        let weight: Vec<f32> = own.weight().iter().map(|w| w * 1.1).collect();
        let other = crate::vision::LastConvWeights::new(320, weight, own.bias().to_vec()).unwrap();
        let (one, two) = (network.compile_features(None).unwrap(), network.compile_features(Some(&other)).unwrap());
        let difference = |other: &CompiledBackbone| relative_difference(&one, other, 3 * 224 * 224).unwrap();
        assert_eq!(difference(&one), 0.0);
        assert!(difference(&two) > DIFFERENCE_MAX, "{}", difference(&two));
        assert!(select(network, ComputeDeviceChoice::Cpu, &features).unwrap().fallback.is_none());
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn falls_back_to_the_cpu_with_a_reason_if_no_gpu_works() {
        let Selected { network, fallback, .. } =
            select(OnnxBackbone::built_in().unwrap(), ComputeDeviceChoice::Gpu, &features).unwrap();
        assert_eq!(network.device(), ComputeDevice::Cpu);
        let reason = fallback.unwrap().to_string();
        assert!(reason.contains("built without the feature `cuda`; the CPU computes the features"), "{reason}");
        assert!(select(network, ComputeDeviceChoice::Auto, &features).unwrap().fallback.is_none());
    }
}
