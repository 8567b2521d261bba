//! What computes the features: the CPU, or a GPU that was seen to give nearly the same.

use std::panic::{self, AssertUnwindSafe};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::vision::backbone::Device;
use crate::vision::{Backbone, BackboneError, Network};

/// Features from a GPU may differ by this share of the largest: its convolutions round otherwise.
const DIFFERENCE_MAX: f32 = 0.01;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Choice {
    /// A GPU where the program was built for one and one works; else the CPU
    #[default]
    Auto,
    Cpu,
    /// A GPU; where none works, the CPU, and a line that says why
    Gpu,
}

/// The network on the device that computes, what `make` makes of it, and why that is not the device that was asked for,
/// where it is not.
pub fn choose(
    network: Network,
    choice: Choice,
    make: &dyn Fn(&Network) -> Result<Backbone, BackboneError>,
) -> Result<(Network, Backbone, Option<String>), BackboneError> {
    let on_cpu = make(&network)?;
    let wanted = match choice {
        Choice::Auto => cfg!(feature = "cuda"),
        Choice::Cpu => false,
        Choice::Gpu => true,
    };
    if !wanted {
        return Ok((network, on_cpu, None));
    }
    let gpu = network.on(Device::Cuda);
    let side = network.input_size();
    // The CUDA runtime may panic where a part of it is not installed.
    let tried = panic::catch_unwind(AssertUnwindSafe(|| {
        let on_gpu = make(&gpu)?;
        Ok((difference(&on_cpu, &on_gpu, 3 * side * side)?, on_gpu))
    }));
    let why = match tried {
        Ok(Ok((difference, on_gpu))) if difference <= DIFFERENCE_MAX => return Ok((gpu, on_gpu, None)),
        Ok(Ok((difference, _))) => format!("the GPU's features differ from the CPU's by {:.1} %", difference * 100.0),
        Ok(Err(error)) => BackboneError::to_string(&error),
        Err(_) => "the CUDA runtime panicked; its message stands above".into(),
    };
    Ok((network, on_cpu, Some(format!("{why}; the CPU computes the features"))))
}

/// The largest difference between what both give for one input, as a share of the largest number.
fn difference(cpu: &Backbone, gpu: &Backbone, input_len: usize) -> Result<f32, BackboneError> {
    let input: Vec<f32> = (0..input_len).map(|i| (i as f32 * 0.37).sin()).collect();
    let (mut cpu, mut gpu) = (cpu.session()?, gpu.session()?);
    let (expected, found) = (cpu.features(&input)?, gpu.features(&input)?);
    let largest = expected.iter().fold(f32::MIN_POSITIVE, |largest, v| largest.max(v.abs()));
    // A number that is none differs from all.
    let off = |(a, b): (&f32, &f32)| if b.is_finite() { (a - b).abs() } else { f32::INFINITY };
    Ok(expected.iter().zip(found).map(off).fold(0.0, f32::max) / largest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn features(network: &Network) -> Result<Backbone, BackboneError> {
        network.features(None)
    }

    #[test]
    fn a_difference_is_a_share_of_the_largest_number() {
        let network = Network::built_in().unwrap();
        let own = &network.last_conv().unwrap().weights;
        let weight: Vec<f32> = own.weight().iter().map(|w| w * 1.1).collect();
        let other = crate::vision::LastConvWeights::new(320, weight, own.bias().to_vec()).unwrap();
        let (one, two) = (network.features(None).unwrap(), network.features(Some(&other)).unwrap());
        let of = |other: &Backbone| difference(&one, other, 3 * 224 * 224).unwrap();
        assert_eq!(of(&one), 0.0);
        assert!(of(&two) > DIFFERENCE_MAX, "{}", of(&two));
        assert_eq!(choose(network, Choice::Cpu, &features).unwrap().2, None);
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn where_no_gpu_works_the_cpu_computes_and_it_is_said() {
        let (network, _, why) = choose(Network::built_in().unwrap(), Choice::Gpu, &features).unwrap();
        assert_eq!(network.device(), Device::Cpu);
        assert!(why.unwrap().contains("built without the feature `cuda`; the CPU computes the features"));
        assert_eq!(choose(network, Choice::Auto, &features).unwrap().2, None);
    }
}
