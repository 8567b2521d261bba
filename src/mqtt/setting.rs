//! What can be changed from afar, under `…/set/<setting>`, until the daemon is started anew.

/// A setting and its new value, valid by itself.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Setting {
    /// Frames are not looked at while true.
    Pause(bool),
    IntervalMs(u64),
    SmoothingMs(u64),
    EnterDwellMs(u64),
    LeaveDwellMs(u64),
    /// For every class, above 0, at most 1.
    Enter(f32),
    Leave(f32),
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingError {
    #[error(
        "no such setting: expected pause, interval_ms, smoothing_ms, enter, leave, enter_dwell_ms or leave_dwell_ms"
    )]
    Name,
    #[error("{got:?}: expected {expected}")]
    Value { got: String, expected: &'static str },
}

/// An hour: nobody waits longer for a flower.
const MS_MAX: u64 = 3_600_000;
/// As much of a wrong value as a log line needs.
const SHOWN_CHARS_MAX: usize = 32;

impl Setting {
    /// `name`: the topic's last level; `payload`: its value as text.
    pub fn parse(name: &str, payload: &[u8]) -> Result<Self, SettingError> {
        let text = String::from_utf8_lossy(payload);
        let text = text.trim();
        let wrong = |expected| SettingError::Value { got: text.chars().take(SHOWN_CHARS_MAX).collect(), expected };
        let ms = || text.parse().ok().filter(|ms| *ms <= MS_MAX).ok_or_else(|| wrong("milliseconds up to 3600000"));
        let share = || {
            text.parse()
                .ok()
                .filter(|share| *share > 0.0 && *share <= 1.0)
                .ok_or_else(|| wrong("a number above 0, at most 1"))
        };
        match name {
            "pause" => match text {
                "true" | "on" | "ON" => Ok(Setting::Pause(true)),
                "false" | "off" | "OFF" => Ok(Setting::Pause(false)),
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_and_checked() {
        assert_eq!(Setting::parse("pause", b"true"), Ok(Setting::Pause(true)));
        assert_eq!(Setting::parse("pause", b"OFF\n"), Ok(Setting::Pause(false)));
        assert_eq!(Setting::parse("interval_ms", b"500"), Ok(Setting::IntervalMs(500)));
        assert_eq!(Setting::parse("enter", b"0.8"), Ok(Setting::Enter(0.8)));
        assert_eq!(Setting::parse("colour", b"1"), Err(SettingError::Name));
        for (name, value) in
            [("enter", "1.5"), ("leave", "NaN"), ("enter_dwell_ms", "-1"), ("interval_ms", "99999999"), ("pause", "")]
        {
            assert!(matches!(Setting::parse(name, value.as_bytes()), Err(SettingError::Value { .. })), "{name}");
        }
        let long = Setting::parse("enter", &[b'x'; 1000]).unwrap_err().to_string();
        assert!(long.len() < 100, "{long}");
    }
}
