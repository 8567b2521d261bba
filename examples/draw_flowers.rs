//! Draws flowers in place of photographs of the built-in model's classes: `draw_flowers FOLDER COUNT SEED` writes `COUNT` drawings
//! of each class to a subfolder with its name.

use std::error::Error;
use std::path::Path;

use bloomcast::demo::drawing;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, count, seed] = &arguments[..] else { return Err("usage: draw_flowers FOLDER COUNT SEED".into()) };
    std::fs::create_dir_all(folder)?;
    let mut rng = fastrand::Rng::with_seed(seed.parse()?);
    Ok(drawing::dataset(Path::new(folder), drawing::five_flowers(), count.parse()?, &mut rng)?)
}
