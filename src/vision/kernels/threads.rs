//! How work is cut among the threads of a team.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use super::team::{THREADS_MAX, Team};

/// One thread's buffers.
#[derive(Debug, Clone, Default)]
pub(super) struct Scratch {
    /// Rows before the depthwise convolution, with padding.
    pub inner: Vec<f32>,
    pub after: Vec<f32>,
}

/// The threads of a run, each with its buffers.
pub(super) struct Threads<'a> {
    pub team: Option<&'a Team>,
    pub scratch: &'a mut [Scratch],
}

/// What a thread does: a range of units, where they go, and its buffers.
type Share<'a> = (Range<usize>, &'a mut [f32], &'a mut Scratch);

impl Threads<'_> {
    /// This thread, where no buffers are needed.
    pub fn alone() -> Self {
        Threads { team: None, scratch: &mut [] }
    }

    pub fn count(&self) -> usize {
        self.scratch.len().max(1)
    }

    /// Cuts units among the threads, `size` numbers of `to` each, the last perhaps fewer.
    pub fn spread(
        &mut self,
        units: usize,
        size: usize,
        to: &mut [f32],
        work: &(impl Fn(Range<usize>, &mut [f32], &mut Scratch) + Sync),
    ) {
        let Some(team) = self.team else {
            return match self.scratch.first_mut() {
                Some(scratch) => work(0..units, to, scratch),
                None => work(0..units, to, &mut Scratch::default()),
            };
        };
        let shares: [Mutex<Option<Share<'_>>>; THREADS_MAX] = [const { Mutex::new(None) }; THREADS_MAX];
        let (threads, mut rest) = (self.scratch.len(), to);
        for (nth, (scratch, share)) in self.scratch.iter_mut().zip(&shares).enumerate() {
            let range = units * nth / threads..units * (nth + 1) / threads;
            let (own, others) = rest.split_at_mut((range.len() * size).min(rest.len()));
            rest = others;
            if !range.is_empty() {
                *share.lock().unwrap_or_else(PoisonError::into_inner) = Some((range, own, scratch));
            }
        }
        team.run(&|nth| {
            let share = shares[nth].lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some((range, to, scratch)) = share {
                work(range, to, scratch);
            }
        });
    }
}

/// So many numbers of a buffer, which grows where it is too small; what stands in them is of no account.
pub(super) fn room(buffer: &mut Vec<f32>, numbers: usize) -> &mut [f32] {
    if buffer.len() < numbers {
        buffer.resize(numbers, 0.0);
    }
    &mut buffer[..numbers]
}
