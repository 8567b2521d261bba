//! Checks that frames in the steady state allocate no memory, so that the heap of a device does not fragment over months.
//!
//! Counts the allocations of all threads of the process, from the pixels of an image of the network's input size to the decision. The
//! libraries that decode a JPEG and resize an image do allocate: their count is printed, and must not grow.

use std::time::{Duration, SystemTime};

use bloomcast::bundle::Bundle;
use bloomcast::decide::{Decider, Rules, Thresholds};
use bloomcast::vision::quality::{QualityLimits, QualityMeter};
use bloomcast::vision::{
    Classifier, FrameDiff, FrameFilter, FrameResult, Preprocess, Preprocessor, ScanBudget, ScanParams, decode,
    test_pattern,
};
use bloomcast_kernels::ThreadPool;
use image::{Rgb, RgbImage};

#[global_allocator]
static COUNTING: dhat::Alloc = dhat::Alloc;

const FRAMES: u32 = 20;

/// Processes frames as the daemon's vision thread does.
struct Pipeline {
    classifier: Classifier,
    decider: Decider,
    filter: FrameFilter,
    now: SystemTime,
}

impl Pipeline {
    fn with_threads(threads: usize, scan_budget: Option<ScanBudget>) -> Self {
        let bundle = Bundle::built_in().unwrap();
        let network = bundle.onnx_backbone(None).unwrap().with_thread_pool(ThreadPool::with_threads(threads).unwrap());
        let backbone = bundle.compile_backbone(&network).unwrap();
        let classifier = Classifier::new(&backbone, bundle.classifier_params()).unwrap();
        let classifier = match scan_budget {
            Some(budget) => {
                // Windows are judged as whole images.
                let (head, ood) = (classifier.params().head.clone(), &classifier.params().ood);
                let unknown = ood.unknown_classes().unwrap().head.clone();
                let params = ScanParams { head, unknown, offsets: [0.0; 2] };
                classifier.with_scanner(&backbone, params, budget).unwrap()
            }
            None => classifier,
        };
        let rules = Rules {
            smoothing: Duration::from_millis(400),
            enter_dwell: Duration::from_millis(600),
            leave_dwell: Duration::from_millis(1200),
            state_interval: Duration::from_secs(1),
            common: Thresholds { enter: 0.7, leave: 0.45 },
            thresholds: vec![Thresholds { enter: 0.7, leave: 0.45 }; bundle.manifest().classes.names().len()],
        };
        let now = SystemTime::now();
        let decider = Decider::new(rules, classifier.labels().clone(), 1, now);
        let quality = QualityMeter::new(QualityLimits { dark: 16.0, blank: 4.0, blurred: 0.4 });
        Pipeline { classifier, decider, filter: FrameFilter { diff: FrameDiff::new(1.0), quality }, now }
    }

    fn process(&mut self, image: &RgbImage) {
        self.now += Duration::from_millis(200);
        match self.classifier.classify_frame(image, &mut self.filter).unwrap() {
            FrameResult::Unfit(quality) => self.decider.unfit(quality, self.now),
            _ => self.decider.classified(self.classifier.last_prediction(), self.now),
        };
    }
}

/// Returns the allocations of [`FRAMES`] frames, after five frames of warm-up.
fn allocations(mut frame: impl FnMut()) -> u64 {
    let count = || dhat::HeapStats::get().total_blocks;
    (0..5).for_each(|_| frame());
    let before = count();
    (0..FRAMES).for_each(|_| frame());
    count() - before
}

/// Scanned frames allocate as much as resizing them does: to the network's input and to the coarse canvas; a frame of the size of the
/// fine canvas is not resized to it.
fn scanned_frames() {
    let frame = decode::encoded(&test_pattern::jpeg(800, 448)).unwrap();
    let preprocess = Preprocess::mobilenet_v2();
    let mut whole = Preprocessor::new(preprocess.clone());
    let mut coarse = Preprocessor::for_input(preprocess, [224, 416]);
    let resizing = allocations(|| {
        whole.resize(&frame);
        coarse.resize(&frame);
    });
    for threads in [1, 2] {
        // Both scales in each frame.
        let mut pipeline = Pipeline::with_threads(threads, Some(ScanBudget { mean: 100.0 }));
        pipeline.filter.diff = FrameDiff::new(0.0);
        let counted = allocations(|| pipeline.process(&frame));
        println!("threads: {threads}; allocations in {FRAMES} scanned frames: {counted}, by resizing: {resizing}");
        assert_eq!(counted, resizing, "a scanned frame allocates memory");
    }
}

fn main() {
    let _profiler = dhat::Profiler::builder().testing().build();
    let jpeg = test_pattern::jpeg(640, 480);
    let large = decode::encoded(&jpeg).unwrap();
    let pattern = decode::encoded(&test_pattern::jpeg(224, 224)).unwrap();
    let inverted = RgbImage::from_fn(224, 224, |x, y| Rgb(pattern.get_pixel(x, y).0.map(|value| 255 - value)));
    let images = [pattern, inverted, RgbImage::new(224, 224)];
    for threads in [1, 2, 3] {
        let mut pipeline = Pipeline::with_threads(threads, None);
        // Each image twice: every other frame is unchanged; the black one is unfit.
        let mut frames = (0..).map(|frame: usize| &images[frame / 2 % 3]);
        let counted = allocations(|| pipeline.process(frames.next().unwrap()));
        println!("threads: {threads}; allocations in {FRAMES} frames from pixels to decision: {counted}");
        assert_eq!(counted, 0, "a frame allocates memory");
    }
    scanned_frames();
    let mut pipeline = Pipeline::with_threads(1, None);
    pipeline.filter.diff = FrameDiff::new(0.0);
    let resizing = allocations(|| pipeline.process(&large));
    let decoding = allocations(|| pipeline.process(&decode::encoded(&jpeg).unwrap()));
    println!(
        "allocations per frame: {} with resizing from 640×480, {} with decoding as well",
        resizing / 20,
        decoding / 20
    );
    assert_eq!(allocations(|| pipeline.process(&large)), resizing, "the count must not grow");
    assert_eq!(allocations(|| pipeline.process(&decode::encoded(&jpeg).unwrap())), decoding, "the count must not grow");
}
