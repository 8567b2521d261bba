//! Writes the template, a small bundle with all members but a backbone, and one seed for the whole file and each member.

use std::fs;

use bloomcast::bundle::selftest::SelfTestOutput;
use bloomcast::bundle::{Bundle, Contents, SelfTest, archive};
use bloomcast::vision::{Head, Labels, LastConvWeights, OodDetector};

fn main() {
    let mut manifest = Bundle::built_in().unwrap().manifest().clone();
    manifest.classes = Labels::new(vec!["daisy".into(), "tulips".into()]).unwrap();
    manifest.backbone.width = 4;
    let mut basis = vec![0.0; 8];
    (basis[0], basis[5]) = (1.0, 1.0);
    let output = SelfTestOutput { probabilities: vec![0.5; 2], similarity: 1.0 };
    let contents = Contents {
        head: Head::new(4, vec![0.5; 8], vec![0.1, 0.2], 1.5).unwrap(),
        ood: OodDetector::new(4, basis, 0.5).unwrap(),
        last_conv: Some(LastConvWeights::new(2, vec![0.25; 8], vec![0.5; 4]).unwrap()),
        backbone: None,
        self_test: Some(SelfTest::new(vec![vec![1.0; 4]], vec![vec![7; 9]], vec![output.clone(), output])),
    };
    manifest.temperature = 1.5;
    manifest.unknown.threshold = 0.5;
    let bytes = Bundle::new(manifest, contents).to_bytes();
    fs::write("template.bloom", &bytes).unwrap();
    fs::create_dir_all("corpus/bundle").unwrap();
    let seed = |name: &str, kind: u8, content: &[u8]| {
        fs::write(format!("corpus/bundle/seed-{name}"), [&[kind][..], content].concat()).unwrap();
    };
    seed("whole", 255, &bytes);
    for (name, content) in archive::unpack(&bytes).unwrap().iter() {
        let kinds = ["manifest.json", "head.safetensors", "tail.safetensors", "selftest.safetensors"];
        let kind = kinds.iter().position(|kind| *kind == name).unwrap();
        seed(name, kind as u8, content);
    }
}
