//! Picture files by their names.

use std::path::Path;

/// File name extensions of pictures, lower case.
pub const EXTENSIONS: [&str; 6] = ["jpg", "jpeg", "jpe", "jfif", "png", "webp"];

/// Returns whether the file name has one of the [`EXTENSIONS`], in upper or lower case.
pub fn is_picture(path: &Path) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str());
    extension.is_some_and(|extension| EXTENSIONS.iter().any(|known| extension.eq_ignore_ascii_case(known)))
}
