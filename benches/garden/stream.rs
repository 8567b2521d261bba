//! Streams of frames as a standing camera delivers them: the cost of scanning beside whole frames, and the events.

use std::time::{Duration, SystemTime};

use bloomcast::bundle::ViewOptions;
use bloomcast::config::Config;
use bloomcast::decide::Decider;
use bloomcast::vision::quality::QualityMeter;
use bloomcast::vision::{Classifier, FrameDiff, FrameFilter, FrameResult, ScanBudget, View};
use bloomcast_kernels::Isa;
use image::RgbImage;

use crate::scenes::{add_noise, scene};
use crate::{Garden, Photograph, SIZES, open, print};

/// Time between two frames.
const INTERVAL: Duration = Duration::from_millis(500);
/// Time that a scene with or without a flower stands still.
const SCENE: Duration = Duration::from_secs(10);
/// Scenes of the stream for recall and cost: each third one has a flower.
const SCENES: usize = 48;
/// Scenes with other kernels than the fastest: for the cost alone.
const SCENES_FOR_COST: usize = 6;
/// Length of a stream of empty scenes.
const EMPTY: Duration = Duration::from_secs(600);
/// Noise of the sensor, as a standard deviation in gray levels.
const NOISE: f32 = 2.0;

/// A camera's frames and the truth: the class of the flower, and the index of its size.
struct Stream<'a> {
    garden: &'a Garden,
    flowers: &'a [Photograph],
    backgrounds: &'a [Photograph],
}

/// The results of a stream.
#[derive(Default)]
struct StreamResult {
    /// Mean wall-clock time of the network for a frame.
    network: Duration,
    /// Of each size: frames with a flower, and those in which it was named right.
    frames: [(usize, usize); SIZES.len()],
    /// Of each size: scenes with a flower, and those for which the right class was observed at the end.
    scenes: [(usize, usize); SIZES.len()],
    events_without_flower: usize,
}

pub fn run(garden: &Garden, flowers: &[Photograph], backgrounds: &[Photograph]) {
    let stream = Stream { garden, flowers, backgrounds };
    for (name, standing) in [("half a second", INTERVAL), ("four seconds", Duration::from_secs(4))] {
        let events = stream.events_of_empty_scenes(standing);
        println!("ten minutes of empty scenes, another one each {name}: {events} events");
    }
    println!("\nstream of scenes of 10 s, a third with a flower, a frame each 0.5 s with noise, one thread:");
    for kernels in Isa::ALL.into_iter().filter(|isa| isa.is_supported()).map(Some).chain([None]) {
        let name = kernels.map_or("tract", Isa::name);
        let is_fastest = kernels == Some(Isa::best());
        let scenes = if is_fastest { SCENES } else { SCENES_FOR_COST };
        let whole = stream.watch(kernels, scenes, ViewOptions { view: Some(View::Whole), ..ViewOptions::default() });
        for mean in [ScanBudget::DEFAULT.mean, 2.0] {
            let view = ViewOptions { view: garden.view, scan_budget: ScanBudget { mean } };
            let result = stream.watch(kernels, scenes, view);
            let ratio = result.network.as_secs_f64() / whole.network.as_secs_f64();
            let ms = |time: Duration| time.as_secs_f64() * 1e3;
            println!("{name}, budget {mean}: {:.1} ms a frame, {ratio:.2} × whole", ms(result.network));
            // Recall does not depend on the kernels.
            if is_fastest {
                for (i, size) in SIZES.into_iter().enumerate() {
                    let ((frames, right), (scenes, observed)) = (result.frames[i], result.scenes[i]);
                    print(&format!("  flower of {size}: frames named right"), right, frames);
                    print("  scenes with the right class after ten seconds", observed, scenes);
                }
                println!("  events in scenes without a flower: {}", result.events_without_flower);
            }
        }
    }
}

impl Stream<'_> {
    fn classifier(&self, kernels: Option<Isa>, view: ViewOptions) -> (Classifier, FrameFilter, Decider) {
        let bundle = &self.garden.bundle;
        let network = bundle.onnx_backbone(None).unwrap().with_kernels(kernels);
        let classifier = bundle.classifier_on(&bundle.compile_backbone(&network).unwrap(), view).unwrap();
        let config = Config::from_settings(&[]).unwrap();
        let quality = QualityMeter::new(config.camera.quality_limits);
        let rules = config.update.policy.rules(classifier.labels()).unwrap();
        let decider = Decider::new(rules, classifier.labels().clone(), 1, SystemTime::UNIX_EPOCH);
        (classifier, FrameFilter { diff: FrameDiff::new(0.0), quality }, decider)
    }

    /// Returns the number of events while empty scenes stand for a time each.
    fn events_of_empty_scenes(&self, standing: Duration) -> usize {
        let view = ViewOptions { view: self.garden.view, ..ViewOptions::default() };
        let (mut classifier, mut filter, mut decider) = self.classifier(Some(Isa::best()), view);
        let frames_per_scene = (standing.as_millis() / INTERVAL.as_millis()) as usize;
        let (mut events, mut standing_frame) = (0, RgbImage::new(1, 1));
        for i in 0..(EMPTY.as_millis() / INTERVAL.as_millis()) as usize {
            let mut rng = self.garden.rng(i);
            if i % frames_per_scene == 0 {
                let background = &self.backgrounds[i / frames_per_scene % self.backgrounds.len()];
                standing_frame = scene(&open(background), None, &mut rng).0;
            }
            let mut frame = standing_frame.clone();
            add_noise(&mut frame, NOISE, &mut rng);
            let decision = decide(&mut classifier, &mut filter, &mut decider, &frame, i).0;
            events += usize::from(decision);
        }
        events
    }

    /// Watches the stream.
    fn watch(&self, kernels: Option<Isa>, scenes: usize, view: ViewOptions) -> StreamResult {
        let (mut classifier, mut filter, mut decider) = self.classifier(kernels, view);
        let labels = classifier.labels().clone();
        let (mut result, mut total) = (StreamResult::default(), 0);
        let frames_per_scene = (SCENE.as_millis() / INTERVAL.as_millis()) as usize;
        for n in 0..scenes {
            let mut rng = self.garden.rng(n);
            let flower = (n % 3 == 2).then(|| &self.flowers[(37 * n) % self.flowers.len()]);
            let size = n / 3 % SIZES.len();
            let background = open(&self.backgrounds[n % self.backgrounds.len()]);
            let standing = scene(&background, flower.map(|flower| (open(flower), SIZES[size])), &mut rng).0;
            let class = flower.map(|flower| labels.position(&flower.class).unwrap());
            let mut observed = None;
            for i in 0..frames_per_scene {
                let mut frame = standing.clone();
                add_noise(&mut frame, NOISE, &mut rng);
                let (event, network, predicted, now) =
                    decide(&mut classifier, &mut filter, &mut decider, &frame, n * frames_per_scene + i);
                result.network += network;
                total += 1;
                observed.clone_from(&now);
                if let Some(class) = class {
                    result.frames[size].0 += 1;
                    result.frames[size].1 += usize::from(predicted == Some(class));
                } else if now.is_some() {
                    result.events_without_flower += usize::from(event);
                }
            }
            if let Some(class) = class {
                result.scenes[size].0 += 1;
                result.scenes[size].1 += usize::from(observed.is_some_and(|name| name == labels.names()[class]));
            }
        }
        result.network /= total;
        result
    }
}

/// Classifies frame `i` and decides: whether there is an event, the network's time, the predicted class, and the observed one.
fn decide(
    classifier: &mut Classifier,
    filter: &mut FrameFilter,
    decider: &mut Decider,
    frame: &RgbImage,
    i: usize,
) -> (bool, Duration, Option<usize>, Option<String>) {
    let at = SystemTime::UNIX_EPOCH + INTERVAL * i as u32;
    let result = classifier.classify_frame(frame, filter).unwrap();
    let (decision, network, predicted) = match result {
        FrameResult::Unfit(quality) => (decider.unfit(quality, at), Duration::ZERO, None),
        FrameResult::Classified(times) => {
            let prediction = classifier.last_prediction();
            (decider.classified(prediction, at), times.backbone, prediction.class())
        }
        FrameResult::Unchanged => {
            let prediction = classifier.last_prediction();
            (decider.classified(prediction, at), Duration::ZERO, prediction.class())
        }
    };
    let observed = decision.observation.class.as_ref().map(|class| class.to_string());
    (decision.event.is_some(), network, predicted, observed)
}
