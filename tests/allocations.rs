//! A frame's steady state asks for no memory: what a device runs for months does not wear its heap out.
//!
//! Counted over all threads of the process, from the pixels of a picture as large as the network's input to the decision. What decodes
//! a JPEG and resizes a picture are libraries, which allocate: that count is printed, and must not grow.

use std::time::{Duration, SystemTime};

use bloomcast::bundle::Bundle;
use bloomcast::decide::{Decider, Rules, Thresholds};
use bloomcast::vision::kernels::Team;
use bloomcast::vision::{Classifier, FrameDiff, decode, test_pattern};
use image::RgbImage;

#[global_allocator]
static COUNTING: dhat::Alloc = dhat::Alloc;

const FRAMES: u32 = 20;

/// What sees a frame as the daemon's vision thread does.
struct Watching {
    classifier: Classifier,
    decider: Decider,
    still: FrameDiff,
    now: SystemTime,
}

impl Watching {
    fn with_threads(threads: usize) -> Self {
        let bundle = Bundle::built_in().unwrap();
        let network = bundle.network(None).unwrap().with_team(Team::of(threads).unwrap());
        let classifier = Classifier::new(&bundle.backbone(&network).unwrap(), bundle.classifier_params()).unwrap();
        let rules = Rules {
            smoothing: Duration::from_millis(400),
            enter_dwell: Duration::from_millis(600),
            leave_dwell: Duration::from_millis(1200),
            state_interval: Duration::from_secs(1),
            thresholds: vec![Thresholds { enter: 0.7, leave: 0.45 }; bundle.manifest().classes.names().len()],
        };
        let now = SystemTime::now();
        Watching { classifier, decider: Decider::new(rules, now), still: FrameDiff::new(1.0), now }
    }

    fn look(&mut self, picture: &RgbImage) {
        self.now += Duration::from_millis(200);
        self.classifier.classify_if_changed(picture, &mut self.still).unwrap();
        self.decider.seen(self.classifier.last(), self.now);
    }
}

/// Allocations of some frames, after some others.
fn allocations(mut frame: impl FnMut()) -> u64 {
    let count = || dhat::HeapStats::get().total_blocks;
    (0..5).for_each(|_| frame());
    let before = count();
    (0..FRAMES).for_each(|_| frame());
    count() - before
}

fn main() {
    let _profiler = dhat::Profiler::builder().testing().build();
    let jpeg = test_pattern::jpeg(640, 480);
    let large = decode::encoded(&jpeg).unwrap();
    let pictures = [decode::encoded(&test_pattern::jpeg(224, 224)).unwrap(), RgbImage::new(224, 224)];
    for threads in [1, 2, 3] {
        let mut watching = Watching::with_threads(threads);
        // Each picture twice: every other frame is still.
        let mut next = (0..).map(|nth: usize| &pictures[nth / 2 % 2]);
        let counted = allocations(|| watching.look(next.next().unwrap()));
        println!("threads: {threads}; allocations in {FRAMES} frames from pixels to decision: {counted}");
        assert_eq!(counted, 0, "a frame allocates");
    }
    let mut watching = Watching::with_threads(1);
    watching.still = FrameDiff::new(0.0);
    let resized = allocations(|| watching.look(&large));
    let whole = allocations(|| watching.look(&decode::encoded(&jpeg).unwrap()));
    println!("allocations a frame: {} to resize 640×480, {} with its decoding", resized / 20, whole / 20);
    assert_eq!(allocations(|| watching.look(&large)), resized, "the same for each frame");
    assert_eq!(allocations(|| watching.look(&decode::encoded(&jpeg).unwrap())), whole, "the same for each frame");
}
