//! The settings that can be changed over MQTT, under `…/set/<setting>`.

use crate::vision_stage::Setting;

/// An error of a message under `…/set/`.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingError {
    /// The topic's last level is not a setting.
    #[error("no such setting: expected one of {}", NAMES.join(", "))]
    Name,
    /// The payload is not a value of the setting.
    #[error("{got:?}: expected {expected}")]
    Value {
        /// The payload as text, at most 32 characters.
        got: String,
        /// Description of the valid values.
        expected: &'static str,
    },
}

/// The names of the settings, the last level of their topics.
pub const NAMES: &[&str] =
    &["pause", "interval_ms", "smoothing_ms", "enter", "leave", "enter_dwell_ms", "leave_dwell_ms"];

/// The longest time of a setting, in milliseconds: one hour.
const MS_MAX: u64 = 3_600_000;
/// Characters of a wrong value that are logged.
const SHOWN_CHARS_MAX: usize = 32;

/// Parses a setting. `name` is the topic's last level, `payload` the value as text, as Home Assistant's templates write it, too:
/// `True`, `250.0`.
///
/// # Errors
/// If the name is unknown, or the value is not in the setting's range.
pub fn parse(name: &str, payload: &[u8]) -> Result<Setting, SettingError> {
    let text = String::from_utf8_lossy(payload);
    let text = text.trim();
    let wrong = |expected| SettingError::Value { got: text.chars().take(SHOWN_CHARS_MAX).collect(), expected };
    let ms = || {
        let whole = text.split_once('.').filter(|(_, zeros)| zeros.bytes().all(|digit| digit == b'0'));
        let whole = whole.map_or(text, |(whole, _)| whole);
        whole.parse().ok().filter(|ms| *ms <= MS_MAX).ok_or_else(|| wrong("milliseconds up to 3600000"))
    };
    let share = || {
        let share = text.parse().ok().filter(|share| *share > 0.0 && *share <= 1.0);
        share.ok_or_else(|| wrong("a number above 0, at most 1"))
    };
    match name {
        "pause" => match text.to_ascii_lowercase().as_str() {
            "true" | "on" | "yes" | "1" => Ok(Setting::Pause(true)),
            "false" | "off" | "no" | "0" => Ok(Setting::Pause(false)),
            _ => Err(wrong("true or false")),
        },
        "interval_ms" => ms().map(Setting::IntervalMs),
        "smoothing_ms" => ms().map(Setting::SmoothingMs),
        "enter_dwell_ms" => ms().map(Setting::EnterDwellMs),
        "leave_dwell_ms" => ms().map(Setting::LeaveDwellMs),
        "enter" => share().map(Setting::Enter),
        "leave" => share().map(Setting::Leave),
        _ => Err(SettingError::Name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_parsed_and_checked() {
        assert_eq!(parse("pause", b"true"), Ok(Setting::Pause(true)));
        assert_eq!(parse("pause", b"OFF\n"), Ok(Setting::Pause(false)));
        for (text, paused) in [("True", true), ("False", false), ("1", true), ("0", false), ("oN", true), ("yes", true)]
        {
            assert_eq!(parse("pause", text.as_bytes()), Ok(Setting::Pause(paused)), "{text}");
        }
        assert_eq!(parse("interval_ms", b"500"), Ok(Setting::IntervalMs(500)));
        assert_eq!(parse("interval_ms", b"250.0"), Ok(Setting::IntervalMs(250)));
        assert!(parse("interval_ms", b"250.5").is_err());
        assert_eq!(parse("enter", b"0.8"), Ok(Setting::Enter(0.8)));
        assert_eq!(parse("colour", b"1"), Err(SettingError::Name));
        for name in NAMES {
            assert!(parse(name, b"1").is_ok(), "{name}");
        }
        for (name, value) in
            [("enter", "1.5"), ("leave", "NaN"), ("enter_dwell_ms", "-1"), ("interval_ms", "99999999"), ("pause", "")]
        {
            assert!(matches!(parse(name, value.as_bytes()), Err(SettingError::Value { .. })), "{name}");
        }
        let long = parse("enter", &[b'x'; 1000]).unwrap_err().to_string();
        assert!(long.len() < 100, "{long}");
    }
}
