//! Tests the selection of kernels by flag and setting.

use bloomcast_kernels::Isa;

use super::tools::{bloomcast, failure, json, output};

#[test]
fn kernels_flag_selects_the_kernels() {
    let bench = |kernels: &str| {
        let mut command = bloomcast();
        command.args(["bench", "--json", "--runs", "1", "--kernels", kernels]);
        command
    };
    for name in ["tract", "portable", Isa::best().name()] {
        assert_eq!(json(&mut bench(name))["kernels"], name);
    }
    assert_eq!(json(&mut bench("auto"))["kernels"], Isa::best().name());
    let removed = output(bench("auto").env("BLOOMCAST_KERNELS", "tract"));
    let warning = "warning: the environment variable BLOOMCAST_KERNELS is ignored; use --kernels\n";
    assert_eq!(String::from_utf8_lossy(&removed.stderr), warning);
}

#[test]
fn every_command_refuses_unknown_and_unsupported_kernels() {
    let image = tempfile::Builder::new().suffix(".jpg").tempfile().unwrap();
    std::fs::write(image.path(), bloomcast::vision::test_pattern::jpeg(64, 64)).unwrap();
    let unsupported = Isa::ALL.into_iter().find(|isa| !isa.is_supported()).expect("x86 has no NEON, ARM no AVX");
    let expected = format!("lacks {}; \"auto\" would select {}", unsupported.name(), Isa::best().name());
    let commands: [&[&str]; 3] = [&["bench"], &["classify", image.path().to_str().unwrap()], &["evaluate", "."]];
    for arguments in commands {
        let (code, text) = failure(bloomcast().args(arguments).args(["--kernels", "sse9"]));
        let names = "possible values: auto, avx512, avx2, neon, portable, tract";
        assert_eq!((code, text.contains(names)), (2, true), "{text}");
        let (code, text) = failure(bloomcast().args(arguments).args(["--kernels", unsupported.name()]));
        assert_eq!((code, text.contains(&expected)), (2, true), "{text}");
    }
    let unsupported = format!("model.kernels={}", unsupported.name());
    for arguments in [["check", "--no-camera"].as_slice(), &["run"]] {
        let (code, text) = failure(bloomcast().args(arguments).args(["--set", "model.kernels=sse9"]));
        let names = "expected one of auto, avx512, avx2, neon, portable, tract";
        assert_eq!((code, text.contains(names)), (78, true), "{text}");
        let (code, text) = failure(bloomcast().args(arguments).args(["--set", &unsupported]));
        assert_eq!((code, text.contains(&expected)), (78, true), "{text}");
    }
}
