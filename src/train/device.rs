//! What computes the features: the CPU, or a GPU that was seen to give the same.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::vision::backbone::Device;
use crate::vision::{BackboneError, Network};

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

/// The network on the device that computes, and why that is not the one that was asked for, where it is not.
pub fn choose(network: Network, choice: Choice) -> (Network, Option<String>) {
    let wanted = match choice {
        Choice::Auto => cfg!(feature = "cuda"),
        Choice::Cpu => false,
        Choice::Gpu => true,
    };
    if !wanted {
        return (network, None);
    }
    let on_gpu = network.on(Device::Cuda);
    match difference(&network, &on_gpu) {
        Ok(difference) if difference <= DIFFERENCE_MAX => (on_gpu, None),
        Ok(difference) => {
            let percent = difference * 100.0;
            (
                network,
                Some(format!("the GPU's features differ from the CPU's by {percent:.1} %; the CPU computes them")),
            )
        }
        Err(error) => (network, Some(format!("{error}; the CPU computes the features"))),
    }
}

/// The largest difference between what both give for one input, as a share of the largest number.
fn difference(cpu: &Network, gpu: &Network) -> Result<f32, BackboneError> {
    let side = cpu.input_size();
    let input: Vec<f32> = (0..3 * side * side).map(|i| (i as f32 * 0.37).sin()).collect();
    let expected = cpu.features(None)?.session()?.features(&input)?;
    let found = gpu.features(None)?.session()?.features(&input)?;
    let largest = expected.iter().fold(f32::MIN_POSITIVE, |largest, v| largest.max(v.abs()));
    // A number that is none differs from all.
    let off = |(a, b): (&f32, &f32)| if b.is_finite() { (a - b).abs() } else { f32::INFINITY };
    Ok(expected.iter().zip(&found).map(off).fold(0.0, f32::max) / largest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_agrees_with_itself() {
        let network = Network::built_in().unwrap();
        assert_eq!(difference(&network, &network).unwrap(), 0.0);
        assert_eq!(choose(network, Choice::Cpu).1, None);
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn where_no_gpu_works_the_cpu_computes_and_it_is_said() {
        let (network, why) = choose(Network::built_in().unwrap(), Choice::Gpu);
        assert!(network.features(None).is_ok());
        assert!(why.unwrap().contains("built without the feature `cuda`; the CPU computes the features"));
        assert_eq!(choose(network, Choice::Auto).1, None);
    }
}
