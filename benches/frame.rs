//! Times the stages of a frame: `cargo bench --bench frame`.

use bloomcast::bundle::Bundle;
use bloomcast::vision::test_pattern;
use bloomcast::vision::{OnnxBackbone, Preprocess, Preprocessor, decode};
use criterion::{Criterion, criterion_group, criterion_main};

fn stages(c: &mut Criterion) {
    let jpeg = test_pattern::jpeg(640, 480);
    let image = decode::encoded(&jpeg).unwrap();
    let spec = Preprocess::mobilenet_v2();
    let mut input = vec![0.0; spec.input_len()];
    let mut preprocessor = Preprocessor::new(spec);
    let backbone = OnnxBackbone::built_in().unwrap().compile_features(None).unwrap();
    let mut session = backbone.session().unwrap();
    preprocessor.run(&image, &mut input);
    let features = session.run(&input).unwrap().to_vec();
    let bundle = Bundle::built_in().unwrap();
    let params = bundle.classifier_params();
    let mut classifier = bundle.classifier(None).unwrap();

    let mut group = c.benchmark_group("frame");
    group.sample_size(30);
    group.bench_function("decode 640×480", |b| b.iter(|| decode::encoded(&jpeg).unwrap()));
    group.bench_function("preprocess 640×480", |b| b.iter(|| preprocessor.run(&image, &mut input)));
    group.bench_function("backbone", |b| b.iter(|| session.run(&input).unwrap()[0]));
    group.bench_function("head", |b| b.iter(|| params.predict(&features)));
    group.bench_function("whole frame", |b| {
        b.iter(|| classifier.classify(&decode::encoded(&jpeg).unwrap()).unwrap().1);
    });
    group.finish();
}

criterion_group!(benches, stages);
criterion_main!(benches);
