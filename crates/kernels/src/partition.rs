//! Divides work among the threads of a pool.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use crate::thread_pool::{THREADS_MAX, ThreadPool};

/// The buffers of one thread.
#[derive(Debug, Clone, Default)]
pub(crate) struct Scratch {
    /// Rows before the depthwise convolution, with padding.
    pub expanded: Vec<f32>,
    /// Rows after the depthwise convolution.
    pub convolved: Vec<f32>,
}

/// The threads of a run, with a scratch each.
pub(crate) struct Workers<'a> {
    pub pool: Option<&'a ThreadPool>,
    pub scratch: &'a mut [Scratch],
}

/// The work of one thread: a range of units, their output, and the thread's buffers.
type Share<'a> = (Range<usize>, &'a mut [f32], &'a mut Scratch);

impl Workers<'_> {
    /// The calling thread alone, for work that needs no buffers.
    pub fn single() -> Self {
        Workers { pool: None, scratch: &mut [] }
    }

    pub fn count(&self) -> usize {
        self.scratch.len().max(1)
    }

    /// Divides units among the threads: `unit_len` values of `to` each, the last perhaps fewer.
    pub fn split(
        &mut self,
        units: usize,
        unit_len: usize,
        to: &mut [f32],
        work: &(impl Fn(Range<usize>, &mut [f32], &mut Scratch) + Sync),
    ) {
        let Some(pool) = self.pool else {
            return match self.scratch.first_mut() {
                Some(scratch) => work(0..units, to, scratch),
                None => work(0..units, to, &mut Scratch::default()),
            };
        };
        let shares: [Mutex<Option<Share<'_>>>; THREADS_MAX] = [const { Mutex::new(None) }; THREADS_MAX];
        let (threads, mut rest) = (self.scratch.len(), to);
        // units × n / threads, without a product that could overflow.
        let begin = |n: usize| units / threads * n + units % threads * n / threads;
        for (n, (scratch, share)) in self.scratch.iter_mut().zip(&shares).enumerate() {
            let range = begin(n)..begin(n + 1);
            let (own, others) = rest.split_at_mut((range.len() * unit_len).min(rest.len()));
            rest = others;
            if !range.is_empty() {
                *share.lock().unwrap_or_else(PoisonError::into_inner) = Some((range, own, scratch));
            }
        }
        pool.run(&|n| {
            let share = shares[n].lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some((range, to, scratch)) = share {
                work(range, to, scratch);
            }
        });
    }
}

/// Returns the first `len` values of a buffer, growing it if needed; their contents are unspecified.
pub(crate) fn grown(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.reserve_exact(len - buffer.len());
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}
